"""Short runs by the shipped configurations, and what is measured in them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from prime_lightning.cli.lightning_cli import PrimeCLI
from prime_lightning.rollout import Prompt, Verdict
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.options import Probe
from prime_lightning.training.passes import check_greedy
from prime_lightning.training.plan.estimates import forward_flops, matrix_parameters
from prime_lightning.training.plan.report import memory_of
from prime_lightning.training.plan.setup import setup_of

CONF = Path(__file__).parents[2] / "conf"
PROBES, PROBE_TOKENS = 4, 32


def coin(prompt: Prompt, text: str) -> Future[Verdict]:
    """A task that a random model gets right half of the time, by the text's checksum."""
    done: Future[Verdict] = Future()
    done.set_result(Verdict.of_score(float(hashlib.sha256(text.encode()).digest()[0] % 2)))
    return done


def settings(model: Path, *, prompts: int, tokens: int, iterations: int) -> dict[str, Any]:
    """The layer over conf/prime.yaml that all runs here share."""
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.0}}
    return {
        "trainer": {
            "default_root_dir": str(model.parent / "run"),
            "max_steps": iterations,
            "devices": 1,
            "logger": False,
            "callbacks": [],
            "enable_checkpointing": False,
            "enable_model_summary": False,
        },
        "model": {
            "policy": str(model),
            "process_reward": {"beta": 0.05, "second_look": 0},
            "gate": {"class_path": "prime_lightning.algorithms.ProcessGate", "init_args": {"min_accuracy": 0.0}},
            "policy_optimizer": adamw,
            "prm_optimizer": adamw,
        },
        "data": {
            "train": {"class_path": "prime_lightning.prompts.ArithmeticPrompts", "init_args": {"seed": 1}},
            "validation": None,
            "sampling": {"samples": 4, "max_tokens": tokens},
            "prompts_per_batch": prompts,
            "max_prompt_tokens": 23,
            "accuracy_filter": {"low": 0.0, "high": 1.0},
            "oversample": 1.0,
        },
    }


def fit(folder: Path, layers: list[str], own: list[dict[str, Any]]) -> dict[str, Any]:
    """Train by conf/prime.yaml, these files of conf/ over it, and these layers over both; what was measured.

    Args:
        folder: For files of the run.
        layers: Under conf/.
        own: Over them.
    """
    files = [CONF / "prime.yaml", *(CONF / layer for layer in layers)]
    for number, layer in enumerate(own):
        files.append(folder / f"layer{number}.yaml")
        files[-1].write_text(json.dumps(layer))  # JSON is YAML
    words = [word for file in files for word in ("--config", str(file))]
    cli = PrimeCLI(PrimeModule, RolloutDataModule, words, run=False)
    cli.datamodule.verifiers.submit = coin
    watch = Watch(cli.model, cli.datamodule, cuda=cli.config.trainer.accelerator == "gpu")
    cli.trainer.callbacks.append(watch)
    cli.trainer.fit(cli.model, cli.datamodule)
    return watch.found | planned(cli.config, watch.lengths)


def planned(config: Any, lengths: dict[str, float]) -> dict[str, Any]:
    """What `prime-lightning plan` says of the run: bytes of the trainer at its peak, operations of one forward."""
    setup = setup_of(config, 1, {})
    memory, shape = memory_of(setup, 0.0), setup.shapes["policy"]
    models = sum(sum(row.values()) for row in memory.models.values())
    prompts = lengths["prompts"] / (setup.samples if setup.shared_prompts else 1)
    tokens = prompts * lengths["prompt"] + lengths["prompts"] * lengths["response"]
    matrix = matrix_parameters(shape.parameters, shape.lookup)
    length = lengths["prompt"] + lengths["response"]
    return {
        "parameters": shape.parameters,
        "planned_bytes": models + sum(memory.training.values()),
        "forward_flops": forward_flops(matrix, shape.layers, shape.hidden, tokens, length),
        "tokens": tokens,
        "engine_share": setup.sampler.fraction,
    }


class Watch(pl.Callback):
    """Measures a run from beside it: numbers of each iteration, memory by phase, what sleep frees, a greedy probe."""

    def __init__(self, module: PrimeModule, data: RolloutDataModule, *, cuda: bool) -> None:
        self.cuda = cuda
        self.lengths: dict[str, float] = {}
        self.found: dict[str, Any] = {"iterations": [], "peak_bytes": {}, "freed_bytes": [], "taken_bytes": []}
        self._timed, self._rest, self._sync = module.stepper.timed, data.rest, data.sync
        module.stepper.timed, data.rest, data.sync = self.timed, self.rest, self.sync  # type: ignore[method-assign]

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """The stepper's clock, stopped only when the device is done; and the peak of memory inside."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        with self._timed(phase):
            yield
            if self.cuda:
                torch.cuda.synchronize()
        if self.cuda:
            self.found["peak_bytes"][phase] = torch.cuda.max_memory_allocated()  # of the last iteration in the end

    def rest(self) -> None:
        """Put the engine to sleep, and see what that frees."""
        before = self.free()
        self._rest()
        self.found["freed_bytes"].append(self.free() - before)

    def sync(self, *arguments: Any) -> None:
        """Wake the engine and send the weights, and see what that takes."""
        before = self.free()
        self._sync(*arguments)
        self.found["taken_bytes"].append(before - self.free())

    def free(self) -> int:
        """Bytes of the device that nobody has, after the trainer's allocator gave back what it holds for later."""
        if not self.cuda:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Keep the iteration's numbers; after the last one, compare engine and trainer, which has new weights then."""
        self.found["iterations"].append(outputs["iteration"].metrics)
        self.lengths = {
            "prompts": len(batch),
            "prompt": float(batch.prompt_length_B.float().mean()),
            "response": float(batch.response_length_B.float().mean()),
        }
        if trainer.global_step == trainer.max_steps:
            data = trainer.datamodule  # type: ignore[attr-defined]
            self.found["engine"] = {
                "name": type(data.engine).__name__,
                "transfer": getattr(data.engine, "transfer", "same process"),
                "version": data.engine.version,
                "iterations": trainer.global_step,
            }
            self.found["greedy"] = greedy(module, data)


def greedy(module: Any, data: RolloutDataModule) -> dict[str, float]:
    """Tokens that the engine takes greedily, beside what the trainer finds likeliest after the same tokens.

    Returns:
        Share of equal tokens, and the greatest `regret`: nats between the trainer's likeliest token and the engine's.
    """
    regret = check_greedy(module.stepper, data, Probe(prompts=PROBES, tokens=PROBE_TOKENS, margin=math.inf))
    equal = float((regret == 0).float().mean())
    return {"tokens": len(regret), "equal": equal, "regret": float(regret.max())}
