"""How long an iteration takes, by phase: RLOO and PRIME, their own passes written by hand, and TRL's RLOOTrainer.

    python benchmarks/training.py --out training.json
    python benchmarks/training.py --model HuggingFaceTB/SmolLM2-135M-Instruct --shape long_prompt
    python benchmarks/training.py --peer-python .tox/peers/bin/python      after `tox -e peers --notest`: TRL, too
    python benchmarks/training.py --vary rollouts 16 32 64    how time and memory grow; samples is K
    python benchmarks/training.py --markdown benchmarks/results/training.md *.json      tables of what --out wrote

Prompts and answers have as many tokens as the shape says, whatever the model says, and every second answer is right.
Each arm is a process of its own, so that its peak memory is its own; the arms run in turns, so that a busy machine
slows all of them alike, and a ratio is the median over turns. Of each process the first iteration is left out. Peak
memory is that of the whole process, `VmHWM` of Linux, loading included.

The floor is what the product's passes cost in plain `transformers`: as many forward passes and updates of each model
as the product was seen to make, padded, on as many tokens, with the vocabulary projected behind response tokens only,
and one AdamW step for each minibatch. `toy` and `50m` are random, with the vocabulary of the arithmetic task.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
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
from bare import bare_trainer
from peers.floor import floor
from peers.memory import peak_gib
from torch import Tensor
from training_tables import machine, medians, page, ratios, table, versions
from transformers import PreTrainedTokenizerBase

from prime_lightning.engines.hf import HFEngine
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.models.options import Loading
from prime_lightning.prompts.arithmetic import write_model
from prime_lightning.prompts.dataset import Prompts
from prime_lightning.rollout import Prompt, Sampling, Verdict
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.options import ProcessReward, Update
from prime_lightning.verifiers import Verifiers

MODELS = {"toy": (128, 5), "50m": (768, 7)}  # hidden size, layers
SHAPES = {"short": (32, 64), "long_prompt": (250, 64), "long_answer": (32, 512)}  # tokens of prompt and answer
ARMS = ("rloo", "rloo_packed", "prime", "prime_packed", "floor_rloo", "floor_prime", "trl")
OUTSIDE = ("sample", "verify", "sync")  # phases that are not training
PEER = Path(__file__).parent / "peers" / "trl_rloo.py"
LEARNING_RATE = 1e-6


VARIED = ("rollouts", "samples", "prompt_tokens", "answer_tokens")


def main(args: Sequence[str] | None = None) -> None:
    options = parser().parse_args(args)
    if options.markdown:
        found = [json.loads(Path(file).read_text()) for file in options.files]
        Path(options.markdown).write_text(page(found))
        return
    asked = settings(options)
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(options.model, Path(folder))
        measured = [measured_in_turns(model, Path(folder), one) for one in asked]
    command = shlex.join(["python", "benchmarks/training.py", *(sys.argv[1:] if args is None else args)])
    found = {"command": command, "vary": options.vary and options.vary[0], "settings": measured}
    found |= {"versions": versions(measured), "machine": machine()}
    print(table(found))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


def settings(options: argparse.Namespace) -> list[argparse.Namespace]:
    """What is measured: once, or once for each value of what varies."""
    name, *values = options.vary or [None, None]
    if name not in (*VARIED, None) or not values or not all(value is None or value.isdigit() for value in values):
        raise SystemExit(f"Expected --vary NAME NUMBER ..., the name one of {', '.join(VARIED)}, got {options.vary}.")
    prompt, answer = SHAPES[options.shape]
    plain = {**vars(options), "prompt_tokens": prompt, "answer_tokens": answer}
    made = [argparse.Namespace(**plain | ({name: int(value)} if name else {})) for value in values]
    for one in made:
        if one.rollouts % one.samples:
            raise SystemExit(f"Expected --rollouts divisible by --samples {one.samples}, got {one.rollouts}.")
    return made


def measured_in_turns(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All arms, in turns; the floors after those whose passes they make."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS if arm in options.arms}
    if options.peer_python is None:
        runs.pop("trl", None)
    for _ in range(options.turns):
        for arm in runs:
            runs[arm].append(run(arm, model, folder, options, runs))
    arms = {arm: medians(turns) for arm, turns in runs.items()}
    return {"options": vars(options), "arms": arms, "ratios": ratios(runs), "runs": runs, "load": os.getloadavg()}


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
    made.add_argument("--vary", nargs="+", metavar=("NAME", "NUMBER"), help="what grows, and its values")
    made.add_argument("--out", help="a JSON file")
    made.add_argument("--markdown", metavar="FILE", help="measure nothing; write the tables of these JSON files")
    made.add_argument("files", nargs="*", metavar="JSON", help="for --markdown, in this order")
    return made


def model_folder(name: str, folder: Path) -> str:
    """A random model of this size, with room for the longest shape; any other name is taken as it is."""
    if name not in MODELS:
        return name
    hidden, layers = MODELS[name]
    made = write_model(folder / name, hidden_size=hidden, layers=layers)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return str(made)


def run(arm: str, model: str, folder: Path, options: argparse.Namespace, runs: Mapping[str, Any]) -> dict[str, Any]:
    """One process of this arm; what it measured."""
    out = folder / f"{arm}.json"
    asked = {**vars(options), "model": model}
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
    out.write_text(json.dumps(measured | {"peak_gib": peak_gib()}))


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
        numbers = {name: value for name, value in outputs["iteration"].metrics.items() if name.startswith("time/")}
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
    trainer = bare_trainer(watch, steps=1 + options.iterations, precision=options.precision)
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["arm"]:
        measure(sys.argv[2], Path(sys.argv[3]), argparse.Namespace(**json.loads(sys.argv[4])))
    else:
        main()
