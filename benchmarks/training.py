"""How long an iteration takes, by phase: RLOO and PRIME, their own passes written by hand, and TRL's RLOOTrainer.

    python benchmarks/training.py --out training.json
    python benchmarks/training.py --model HuggingFaceTB/SmolLM2-135M-Instruct --shape long_prompt
    python benchmarks/training.py --peer-python .tox/peers/bin/python      after `tox -e peers --notest`: TRL, too

Prompts and answers have as many tokens as the shape says, whatever the model says, and every second answer is right.
Each arm is a process of its own, so that its peak memory is its own; the arms run in turns, so that a busy machine
slows all of them alike, and a ratio is the median over turns. Of each process the first iteration is left out.

The floor is what the product's passes cost in plain `transformers`: as many forward passes and updates of each model
as the product was seen to make, padded, on as many tokens, with the vocabulary projected behind response tokens only,
and one AdamW step for each minibatch. `toy` and `50m` are random, with the vocabulary of the arithmetic task.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peers.floor import floor
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prime_lightning.acceptance import AccuracyFilter
from prime_lightning.arithmetic import write_model
from prime_lightning.data import RolloutDataModule
from prime_lightning.engines.hf import HFEngine
from prime_lightning.logprobs import ScoringLM
from prime_lightning.module import PrimeModule
from prime_lightning.options import Loading, ProcessReward, Update
from prime_lightning.prompts import Prompts
from prime_lightning.rollout import Prompt, Sampling, Verdict
from prime_lightning.verifiers import Verifiers

MODELS = {"toy": (128, 5), "50m": (768, 7)}  # hidden size, layers
SHAPES = {"short": (32, 64), "long_prompt": (250, 64), "long_answer": (32, 512)}  # tokens of prompt and answer
ARMS = ("rloo", "rloo_packed", "prime", "prime_packed", "floor_rloo", "floor_prime", "trl")
OUTSIDE = ("sample", "verify", "sync")  # phases that are not training
RATIOS = (  # what is divided, of which arm, by which arm's
    ("iteration", "trl", "rloo"),
    ("iteration", "trl", "rloo_packed"),
    ("training", "trl", "rloo"),
    ("training", "trl", "rloo_packed"),
    ("training", "rloo", "floor_rloo"),
    ("training", "rloo_packed", "floor_rloo"),
    ("training", "prime", "floor_prime"),
    ("training", "prime_packed", "floor_prime"),
    ("training", "prime", "rloo"),
    ("training", "prime_packed", "rloo_packed"),
    ("peak_gib", "rloo", "trl"),
)
PEER = Path(__file__).parent / "peers" / "trl_rloo.py"
LEARNING_RATE = 1e-6


def main(args: Sequence[str] | None = None) -> None:
    options = parser().parse_args(args)
    if options.rollouts % options.samples:
        raise SystemExit(f"Expected --rollouts divisible by --samples {options.samples}, got {options.rollouts}.")
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS if arm in options.arms}
    if options.peer_python is None:
        runs.pop("trl", None)
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(options.model, Path(folder))
        for _ in range(options.turns):
            for arm in runs:  # the floors after those whose passes they make
                runs[arm].append(run(arm, model, Path(folder), options, runs))
    found = {"arms": {arm: medians(turns) for arm, turns in runs.items()}, "ratios": ratios(runs), "runs": runs}
    found |= {"options": vars(options), "versions": versions(runs), "load": os.getloadavg()}
    print(table(found, sys.argv[1:] if args is None else args))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="toy", help="toy, 50m, a folder or a Hugging Face id")
    made.add_argument("--shape", default="short", choices=[*SHAPES])
    made.add_argument("--rollouts", type=int, default=32, help="of one iteration")
    made.add_argument("--samples", type=int, default=8, help="responses to a prompt")
    made.add_argument("--iterations", type=int, default=3, help="of each process, behind one that is not measured")
    made.add_argument("--turns", type=int, default=2)
    made.add_argument("--minibatches", type=int, default=1, help="optimizer steps of an iteration; TRL makes one")
    made.add_argument("--micro_tokens", type=int, default=4096, help="tokens of one forward and backward")
    made.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    made.add_argument(
        "--peer-python", help="interpreter of an environment that has TRL; without it that arm is left out"
    )
    made.add_argument("--out")
    return made


def model_folder(name: str, folder: Path) -> str:
    """A random model of this size, with room for the longest shape; any other name is taken as it is."""
    if name not in MODELS:
        return name
    hidden, layers = MODELS[name]
    made = write_model(folder / name, hidden_size=hidden, layers=layers)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return str(made)


def run(arm: str, model: str, folder: Path, options: argparse.Namespace, runs: Mapping[str, Any]) -> dict[str, Any]:
    """One process of this arm; what it measured."""
    out = folder / f"{arm}.json"
    prompt, answer = SHAPES[options.shape]
    asked = {**vars(options), "model": model, "prompt_tokens": prompt, "answer_tokens": answer}
    if arm.startswith("floor_"):
        asked["passes"] = passes_of(arm.removeprefix("floor_"), runs)
    python, script = (options.peer_python, PEER) if arm == "trl" else (sys.executable, Path(__file__))
    words = [python, str(script), "arm", arm, str(out), json.dumps(asked)]
    shown = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=os.environ | shown, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Expected the arm {arm} to end well, got code {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def passes_of(product: str, runs: Mapping[str, Any]) -> dict[str, float]:
    """The passes that the product made in its last turn."""
    if not runs.get(product):
        raise SystemExit(f"Expected the arm {product} beside floor_{product}, which makes its passes, got no such arm.")
    return runs[product][-1]["passes"]  # type: ignore[no-any-return]


# ---- in the process of an arm


def measure(arm: str, out: Path, options: argparse.Namespace) -> None:
    """Run one arm and write what it took."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measured = floor(options) if arm.startswith("floor_") else product(arm, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB
    out.write_text(json.dumps(measured | {"peak_gib": peak}))


class Tokens(Prompts):
    """Prompts of random tokens, each of exactly as many."""

    source, kind = "tokens", "exact"

    def __init__(self, length: int) -> None:
        self.length = length

    def row(self, draw: int) -> Mapping[str, Any]:
        return {}

    def prompt(self, draw: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        generator = torch.Generator().manual_seed(draw)
        ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
        chosen = torch.randint(len(ordinary), (self.length,), generator=generator).tolist()
        return Prompt(draw=draw, token_ids=tuple(ordinary[i] for i in chosen), text="", kind=self.kind)


class Alternating(Verifiers):
    """Calls every second answer right, so that each group has a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = itertools.cycle((0.0, 1.0))

    def submit(self, prompt: Prompt, text: str) -> Future[Verdict]:
        done: Future[Verdict] = Future()
        done.set_result(Verdict.of_score(next(self.scores)))
        return done


class EndlessEngine(HFEngine):
    """Knows no end token, so that each answer has all its tokens."""

    def start(self, model: str) -> None:
        super().start(model)
        self.end_ids = [-1]


class Watch(pl.Callback):
    """Seconds of each iteration and its phases, and the passes of the last one in units of all rollouts."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.passes = Counter[str]()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        for role in ("policy", "prm", "reference"):
            for part in (getattr(module, role) or torch.nn.Module()).modules():
                if isinstance(part, ScoringLM):
                    part.register_forward_hook(lambda _, given, out, role=role: self.passed(role, given[0]))
        self.begun = time.perf_counter()

    def passed(self, role: str, tokens_BL: Tensor) -> None:
        self.passes[f"{role} {'update' if torch.is_grad_enabled() else 'forward'}"] += len(tokens_BL)

    def on_train_batch_start(self, *_: Any) -> None:
        self.passes.clear()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        numbers = {name: value for name, value in outputs["metrics"].items() if name.startswith("time/")}
        phases = {name.removeprefix("time/"): value for name, value in numbers.items()}
        self.rows.append({"iteration": now - self.begun, **phases})
        self.begun, self.rollouts, self.tokens = now, len(batch), int(batch.mask_BT.sum())


def product(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Iterations of `PrimeModule`, sampling included."""
    data = RolloutDataModule(
        options.model,
        train=Tokens(options.prompt_tokens),
        engine=EndlessEngine(dtype=dtype(options), device="cpu"),
        sampling=Sampling(samples=options.samples, max_tokens=options.answer_tokens, seed=1),
        prompts_per_batch=options.rollouts // options.samples,
        accuracy_filter=AccuracyFilter(low=0.0, high=1.0),
        verifiers=Alternating(),
    )
    watch = Watch()
    trainer = pl.Trainer(
        max_steps=1 + options.iterations,
        accelerator="cpu",
        devices=1,
        precision=options.precision,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(prime_module(arm, options), data)
    rows = watch.rows[1:]
    found = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    found["training"] = found["iteration"] - sum(found[name] for name in OUTSIDE)
    passes = {name: count / watch.rollouts for name, count in watch.passes.items()}
    return {"seconds": found, "passes": passes, "answer_tokens": watch.tokens}


def prime_module(arm: str, options: argparse.Namespace) -> PrimeModule:
    """RLOO has neither PRM nor reference; PRIME has both, of the policy's weights."""
    update = Update(minibatches=options.minibatches, micro_tokens=options.micro_tokens)
    other = options.model if arm.startswith("prime") else None
    return PrimeModule(
        options.model,
        prm=other,
        reference=other,
        loading=Loading(attention="varlen", packed=True) if arm.endswith("packed") else Loading(),
        process_reward=ProcessReward(second_look=0),
        policy_update=update,
        prm_update=update,
        policy_optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE),
        prm_optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE),
    )


def dtype(options: argparse.Namespace) -> Any:
    """Of the engine's weights."""
    return "bfloat16" if options.precision == "bf16-mixed" else "float32"


# ---- what it comes to


def medians(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over turns; passes and tokens are those of the last one."""
    seconds = {name: statistics.median(turn["seconds"][name] for turn in turns) for name in turns[0]["seconds"]}
    peak = statistics.median(turn["peak_gib"] for turn in turns)
    return {"seconds": seconds, "peak_gib": peak, **{name: turns[-1].get(name) for name in ("passes", "answer_tokens")}}


def ratios(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Each pair of arms that ran, turn by turn."""
    found = {}
    for what, above, below in RATIOS:
        if above in runs and below in runs:
            pairs = zip(runs[above], runs[below], strict=True)
            found[f"{what}: {above} / {below}"] = statistics.median(
                (a | a["seconds"])[what] / (b | b["seconds"])[what] for a, b in pairs
            )
    return found


def versions(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Of what was measured; the peer says its own."""
    names = ("prime_lightning", "torch", "transformers", "lightning")
    mine = {"python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        mine |= {name: importlib.metadata.version(name) for name in names}
    peer = runs["trl"][-1]["versions"] if runs.get("trl") else {}
    return mine | {f"peer's {name}" if name in mine else name: version for name, version in peer.items()}


def table(found: Mapping[str, Any], args: Sequence[str]) -> str:
    """Markdown, to be pasted into a file of results."""
    options, arms = found["options"], found["arms"]
    phases = list(dict.fromkeys(name for arm in arms.values() for name in arm["seconds"]))
    phases.sort(key=("iteration", "sample", "verify", "sync", "training", "score", "prm", "policy").index)
    prompt, answer = SHAPES[options["shape"]]
    lines = [
        f"`{options['model']}`, {options['shape']} ({prompt} tokens of prompt, {answer} of answer), "
        f"{options['rollouts']} rollouts, {options['samples']} a prompt, {options['precision']}; seconds, medians over "
        f"{options['turns']} turns of {options['iterations']} iterations:",
        "",
        f"| arm | {' | '.join(phases)} | peak GiB |",
        f"|---{'|---' * len(phases)}|---|",
    ]
    for name, arm in arms.items():
        cells = [f"{arm['seconds'][phase]:.3f}" if phase in arm["seconds"] else "" for phase in phases]
        lines.append(f"| {name} | {' | '.join(cells)} | {arm['peak_gib']:.2f} |")
    lines += ["", "| ratio | median over turns |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in found["ratios"].items()]
    lines += ["", "Passes of an iteration over all rollouts:"]
    lines += [f"{name}: {made(arm['passes'])}." for name, arm in arms.items() if arm["passes"]]
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = ", ".join(f"{one:.1f}" for one in found["load"])
    command = shlex.join(["python", "benchmarks/training.py", *args])
    return "\n".join([*lines, "", f"{named}; {options['threads']} threads; load averages {load}; `{command}`."])


def made(passes: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in passes.items())


if __name__ == "__main__":
    if sys.argv[1:2] == ["arm"]:
        measure(sys.argv[2], Path(sys.argv[3]), argparse.Namespace(**json.loads(sys.argv[4])))
    else:
        main()
