"""Runs of the real pipeline that are small enough for a test: a tiny model, arithmetic, the hf engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from prime_lightning.engines.hf import HFEngine
from prime_lightning.prompts.arithmetic import ArithmeticLessons, ArithmeticPrompts, write_model
from prime_lightning.rollout import Prompt, Sampling, Verdict
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.callbacks.outputs import HuggingFaceExport
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.options import Update
from prime_lightning.training.sft import LessonDataModule, SFTModule
from prime_lightning.training.strategies.checkpoint import AtomicCheckpointIO

EVERYTHING = AccuracyFilter(low=0.0, high=1.0)


class History(DummyLogger):
    """A logger that keeps what each iteration logged, without the times, and what its training step returned."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.outputs: list[Any] = []  # of `panel.Iteration`

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({k: v for k, v in metrics.items() if "time/" not in k and "second" not in k})


class Outputs(pl.Callback):
    """Hands the iterations that training steps return to a `History`."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        if isinstance(trainer.logger, History):
            trainer.logger.outputs.append(outputs.get("iteration"))  # other modules than PrimeModule have none


def parity(prompt: Prompt, text: str) -> Future[Verdict]:
    """A verifier's `submit` for a task that even a random model gets right half of the time: an even checksum."""
    done: Future[Verdict] = Future()
    done.set_result(Verdict.of_score(float(hashlib.sha256(text.encode()).digest()[0] % 2 == 0)))
    return done


class Backwards(HFEngine):
    """Finishes groups in the opposite order, so that all of a round are whole before the first is decided."""

    def stream(self, prompts: Any, sampling: Any, finished: Any = None) -> Iterator[Any]:
        yield from reversed(list(super().stream(prompts, sampling, finished)))


def adam(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def module(model: Path | str, **options: Any) -> PrimeModule:
    settings: dict[str, Any] = {
        "prm": str(model),
        "policy_update": Update(minibatches=2, micro_tokens=512),
        "prm_update": Update(minibatches=2, micro_tokens=512, grad_clip=10.0),
        "policy_optimizer": adam(1e-3),
        "prm_optimizer": adam(1e-3),
    }
    return PrimeModule(str(model), **(settings | options))


def data(model: Path | str, **options: Any) -> RolloutDataModule:
    settings: dict[str, Any] = {
        "train": ArithmeticPrompts(seed=1, operations=2),
        "engine": HFEngine(batch_size=32),
        "sampling": Sampling(samples=4, max_tokens=8),
        "prompts_per_batch": 4,
        "accuracy_filter": EVERYTHING,
    }
    return RolloutDataModule(str(model), **(settings | options))


def trainer(
    folder: Path | str, steps: int, *callbacks: pl.Callback, history: History | None = None, **options: Any
) -> pl.Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": 1,
        "logger": history or False,
        "log_every_n_steps": 1,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": [Outputs(), *callbacks],
    }
    return pl.Trainer(**(settings | options))


def fit(folder: Path | str, prime: PrimeModule, rollouts: RolloutDataModule, steps: int, **options: Any) -> History:
    history = History()
    trainer(folder, steps, history=history, **options).fit(prime, rollouts)
    return history


def warm(folder: Path) -> Path:
    """A model that a quick supervised warm start brings to answer about half of the two-step chains."""
    write_model(folder / "init")
    lessons = LessonDataModule(str(folder / "init"), ArithmeticLessons(size=19_200, operations=2), batch_size=64)
    learner = SFTModule(str(folder / "init"), optimizer=adam(5e-3))
    trainer(folder, 300, callbacks=[HuggingFaceExport(str(folder))]).fit(learner, lessons)
    return folder / "policy"
