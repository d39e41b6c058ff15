"""`prime-lightning quickstart`: a tiny model learns chained arithmetic by PRIME, on a CPU, in a few minutes.

It makes a random model, warms it up on an imperfect teacher, measures it, trains it by PRIME, and measures it again on
the same 1,000 problems that it never trained on. Each step is a `prime-lightning` command that it prints, so that the
way out of the toy is another `--config`.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from prime_lightning.cli.lightning_cli import PrimeCLI, lightning, parsed
from prime_lightning.cli.usage import Parser
from prime_lightning.evaluation.resources import resource
from prime_lightning.prm import credit
from prime_lightning.prompts.arithmetic import write_model
from prime_lightning.report import write_report
from prime_lightning.rollout.files import dumps, replace_text


def main(args: Sequence[str]) -> int:
    """Run the quickstart."""
    options = parser().parse_args(args)
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"Expected a new or empty folder, got {options.out!r} with files in it. Choose another --out.")
    quiet()
    parsed(layered(out, options))  # a mistake in a layer shows now, not behind the warm start
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    summary = run(out, options)
    replace_text(out / "summary.json", dumps(summary, indent=2) + "\n")
    report = write_report([out], out / "report.html")
    print(
        f"\nPRIME took the tiny model from {summary['pass1_before']:.1%} to {summary['pass1_after']:.1%} of "
        f"{summary['problems']} fresh problems (pass@1 at temperature 1) in {summary['seconds']:.0f} s, seed "
        f"{options.seed}.\nTrained models: {out / 'policy'}, {out / 'prm'}   "
        f"Rollouts, token by token: {out / 'rollouts.jsonl'}\n{credit.summary(summary['step_auc'])}\nReport: {report}"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    made = Parser(prog="prime-lightning quickstart", description=__doc__)
    made.add_argument("--out", default="runs/quickstart", help="new folder for everything that it writes")
    made.add_argument("--seed", type=int, default=0, help="of the model, the problems and the sampling")
    made.add_argument("--threads", type=int, default=1, help="of torch; matrices this small gain nothing from more")
    made.add_argument("--lessons", type=int, default=64_000, help="examples of the warm start")
    made.add_argument("--iterations", type=int, default=40, help="of PRIME")
    made.add_argument(
        "--config", action="append", default=[], help="layer over conf/quickstart.yaml, such as conf/engine/vllm.yaml"
    )
    return made


def run(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All steps; returns what `summary.json` holds."""
    started = time.perf_counter()
    prime, folder = layered(out, options), placed(out, options)
    write_model(out / "init", seed=options.seed)

    def measure(model: Path) -> float:
        quietly = ["--trainer.logger", "false", "--verbose", "false"]
        ran = run_command(["validate", *prime, "--model.policy", str(model), *quietly])
        return float(ran.trainer.callback_metrics["val/pass1"])

    lessons = ["--data.lessons.init_args.size", str(options.lessons)]
    run_command(["sft", "--config", str(config("quickstart_sft.yaml")), *folder, *lessons])
    before = measure(out / "warm" / "policy")
    trained = run_command(["fit", *prime, "--trainer.max_steps", str(options.iterations)])
    after = measure(out / "policy")
    return {
        "pass1_before": before,
        "pass1_after": after,
        "step_auc": credit.of_run(out),
        "seconds": time.perf_counter() - started,
        "problems": trained.datamodule.validation_prompts,
        "iterations": trained.trainer.global_step,
        "seed": options.seed,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def placed(out: Path, options: argparse.Namespace) -> list[str]:
    """Where all steps write, and their seed."""
    return ["--trainer.default_root_dir", str(out), "--seed_everything", str(options.seed)]


def layered(out: Path, options: argparse.Namespace) -> list[str]:
    """The configuration of the steps behind the warm start: conf/quickstart.yaml and the user's layers."""
    layers = [str(config("quickstart.yaml")), *options.config]
    return [*(word for layer in layers for word in ("--config", layer)), *placed(out, options)]


def run_command(args: list[str]) -> PrimeCLI:
    """Print a command, then run it."""
    print(f"\n$ prime-lightning {shlex.join(args)}", flush=True)
    return lightning(args)


def config(name: str) -> Path:
    """A shipped configuration."""
    return resource("conf", name)


def quiet() -> None:
    """Leave out what a reader of the quickstart cannot use."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    for message in (".*LeafSpec.*", ".*Checkpoint directory.*"):
        warnings.filterwarnings("ignore", message=message)
