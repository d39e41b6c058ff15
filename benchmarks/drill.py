"""Failure drill: a run on two ranks that is struck again and again, and must end with the weights of one that was not.

    python benchmarks/drill.py --out runs/drill --seed 0

Two ranks under torchrun with DDP on the quickstart's task, sampling and grading in processes of their own. At random
moments one of these happens: SIGKILL to a rank, to the launcher, to an engine (which does not start again here, so
that the run has to stop), or to a verifier worker; a full disk under the checkpoints; gradients that are NaN. Where
the run cannot go on, all processes must end within a bounded time, and it is started again from `last`. At the end the
weights, optimizers and schedules must be bit-equal to the undisturbed run's. Writes results.md.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from strikes import KINDS, Drill, Event
from torch import Tensor

from prime_lightning.cli.commands.quickstart import config, quiet
from prime_lightning.cli.lightning_cli import lightning
from prime_lightning.engines import FinishedSamples
from prime_lightning.engines.hf import HFEngine
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, write_model
from prime_lightning.rollout import Completion, Prompt, Sampling

# ---- what the run is made of


class Graded(ArithmeticPrompts):
    """Arithmetic that a worker process grades."""

    kind = "drill.right"


def right(prompt: Prompt, completion: str) -> float:
    """The verifier."""
    return float(completion.rpartition("#")[2].strip() == prompt.answer)


class ChildEngine:
    """`HFEngine` in a process of its own, so that it can be killed. A death ends the run."""

    def __init__(self, folder: str) -> None:
        self.version, self.folder = -1, Path(folder)
        self.context = None
        self._child: Any = None

    def start(self, model: str) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, model, os.getpid()), daemon=True)
        self._child.start()
        theirs.close()
        (self.folder / f"engine{os.environ.get('RANK', 0)}.pid").write_text(str(self._child.pid))
        self._ask("ready")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._ask("load_weights", [(name, tensor.cpu().numpy()) for name, tensor in weights], version)
        self.version = version

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: FinishedSamples | None = None
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        yield from self._ask("stream", list(prompts), sampling)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None
        self.version = -1

    def _ask(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ValueError("The engine's process is gone.") from error


def _serve(pipe: Any, model: str, parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the rank
    if os.getppid() != parent:
        return
    torch.set_num_threads(1)
    engine = HFEngine(batch_size=64, device="cpu")
    engine.start(model)
    while True:
        what, *rest = pipe.recv()
        if what == "load_weights":
            engine.load_weights([(name, torch.from_numpy(array)) for name, array in rest[0]], rest[1])
        pipe.send(list(engine.stream(*rest)) if what == "stream" else None)


class Struck(pl.Callback):
    """Says where the run is and who its processes are, and spoils gradients of rank 1 while there is a file `nan`."""

    def __init__(self, folder: str) -> None:
        self.folder, self.spoilt = Path(folder), False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        (self.folder / f"rank{trainer.global_rank}.pid").write_text(str(os.getpid()))
        if trainer.global_rank == 1:
            parameter = next(module.policy.parameters())
            parameter.register_hook(lambda g: g * float("nan") if self.spoilt else g)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # of whole iterations: steps that are left out of one that is finished are no failure, and are saved
        self.spoilt = (self.folder / "nan").exists()
        if trainer.is_global_zero:
            partial = self.folder / "progress.partial"
            partial.write_text(str(trainer.global_step))
            partial.replace(self.folder / "progress")


# ---- what is compared


def equal(a: Any, b: Any) -> bool:
    """Bit-equal, whatever is nested in whatever."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def final(folder: Path) -> dict[str, Any]:
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {key: saved[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def campaign(out: Path, model: Path, kinds: Sequence[str], options: Any) -> tuple[list[Event], bool, int]:
    """All strikes on one run; returns them, whether it ended as the undisturbed one did, and its starts."""
    how = options.iterations, options.seed, options.filter
    undisturbed = Drill(out / "undisturbed", model, *how)
    calm = undisturbed.start()
    struck = Drill(out / "struck", model, *how)
    with struck.small_disk():
        events = struck_by(kinds, struck)
        if calm.wait(600):
            raise SystemExit(undisturbed.log.read_text()[-3000:])
        return events, equal(final(struck.folder), final(undisturbed.folder)), struck.starts


def struck_by(kinds: Sequence[str], struck: Drill) -> list[Event]:
    """Each strike in its turn, started again after those that end the run, to the run's end."""
    events: list[Event] = []
    run: subprocess.Popen[str] | None = None
    for kind in kinds:
        run = run or struck.start()
        events.append(struck.strike(kind, run, events[-1].iteration if events and kind == "verifier" else -1))
        print(events[-1], flush=True)
        if events[-1].seconds is not None:
            run = None
    run = run or struck.start()
    if run.wait(600):
        raise SystemExit(struck.log.read_text()[-3000:])
    return events


def report(events: list[Event], same: bool, starts: int, options: argparse.Namespace) -> str:
    rows = ["| what | times | the run | seconds until all processes had ended, most |", "|---|---|---|---|"]
    for kind in dict.fromkeys(event.kind for event in events):
        mine = [event for event in events if event.kind == kind]
        seconds = [event.seconds for event in mine if event.seconds is not None]
        went = "stopped, and was resumed from `last`" if seconds else "went on"
        rows.append(f"| {kind} | {len(mine)} | {went} | {f'{max(seconds):.1f}' if seconds else '-'} |")
    verdict = "bit-equal to" if same else "NOT equal to"
    log = [f"- iteration {e.iteration}: {e.kind}" + (f"; said: {e.said}" if e.said else "") for e in events]
    return "\n".join(
        [
            "# Failure drill",
            "",
            f"{len(events)} strikes on one run of {options.iterations} iterations and {starts} starts. Weights, "
            f"optimizers and schedules at its end are **{verdict}** those of the undisturbed run.",
            "",
            *rows,
            "",
            f"Seed {options.seed}; torch {torch.__version__}, lightning {pl.__version__}, python "
            f"{sys.version.split()[0]}; two ranks on a shared CPU; `python {' '.join(sys.argv)}`.",
            "",
            *log,
            "",
        ]
    )


def warm(out: Path) -> Path:
    """The quickstart's model after a short warm start."""
    folder = [
        "--trainer.default_root_dir",
        str(out / "model"),
        "--data.lessons.init_args.size=12800",
        "--data.lessons.init_args.operations=2",
    ]
    write_model(out / "model" / "init")
    lightning(["sft", "--config", str(config("quickstart_sft.yaml")), *folder, "--trainer.logger=false"])
    return out / "model" / "warm" / "policy"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/drill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strikes", type=int, default=24)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="these, in this order, in place of random ones")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--filter", nargs=2, type=float, default=(0.0, 1.0), help="accuracies of groups that are kept")
    parser.add_argument("--model", help="a warm model in place of a new one")
    options = parser.parse_args(args)
    quiet()
    torch.set_num_threads(1)
    out = Path(options.out).resolve()
    out.mkdir(parents=True)
    model = Path(options.model).resolve() if options.model else warm(out)
    rounds = -(-options.strikes // len(KINDS))
    chosen = options.kinds or random.Random(options.seed).sample(list(KINDS) * rounds, options.strikes)
    events, same, starts = campaign(out, model, chosen, options)
    (out / "results.md").write_text(report(events, same, starts, options))
    print((out / "results.md").read_text())
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
