"""What happens between iterations: weights to the engine, rollouts to disk, models to folders, progress."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from prime_lightning.batch import Batch
from prime_lightning.lora import merged_parameters, save_merged
from prime_lightning.measures import run_facts
from prime_lightning.module import PrimeModule
from prime_lightning.pretrained import save
from prime_lightning.prm.folder import describe
from prime_lightning.rollout import Rollout


class WeightSync(Callback):
    """Sends the policy's weights to the engine before it samples; version n is the policy after n iterations."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start, and resume, with the policy's weights."""
        self._send(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each iteration."""
        self._send(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before a validation outside of `fit`."""
        self._send(trainer, pl_module)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def _send(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PrimeModule)
        engine = trainer.datamodule.engine  # type: ignore[attr-defined]
        if engine.version != trainer.global_step:
            with pl_module.timed_between("sync"):
                engine.load_weights(policy_weights(pl_module), version=trainer.global_step)


def policy_weights(module: PrimeModule) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights by their Hugging Face names, tied ones once, adapters merged."""
    return merged_parameters(module.policy.model)


Steps = Callable[[Rollout, list[str]], list[tuple[int, int, bool]]]
"""`(rollout, its tokens as text) -> (first token, token after the last, whether it is right)` of each step."""


class RolloutLog(Callback):
    """Writes trained-on rollouts with their token rewards as jsonl, one line a response; docs/report.md lists the keys.

    Args:
        folder: Where `rollouts.jsonl` goes.
        groups: Prompts of an iteration that are kept.
        every: Iterations between two writes.
        steps: Says which steps are truly right, on tasks where that is known, such as
            `prime_lightning.arithmetic.written_steps`. Only the report reads it.
    """

    def __init__(self, folder: str, groups: int = 4, every: int = 1, steps: Steps | None = None) -> None:
        self.path, self.groups, self.every, self.steps = Path(folder) / "rollouts.jsonl", groups, every, steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget lines of iterations that a resumed run will do again, and a line that a crash cut off."""
        if not trainer.is_global_zero or not self.path.is_file():
            return
        kept = [line for line in self.path.read_text().splitlines() if _iteration(line) < trainer.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write this iteration."""
        iteration = trainer.global_step - 1
        if not trainer.is_global_zero or iteration % self.every:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scale = trainer.callback_metrics.get("process/scale")
        unit = {} if scale is None else {"beta": pl_module.reward.beta, "scale": _short(float(scale))}  # type: ignore[union-attr]
        with self.path.open("a") as file:
            for row in rollout_rows(outputs, iteration, self.groups, pl_module.tokenizer, self.steps):  # type: ignore[arg-type]
                file.write(json.dumps(row | unit) + "\n")


def rollout_rows(
    outputs: Mapping[str, Any], iteration: int, groups: int, tokenizer: Any, steps: Steps | None = None
) -> Iterator[dict[str, Any]]:
    """The responses of the first groups of an iteration, with rewards and advantages token by token."""
    batch: Batch = outputs["batch"]
    for i, rollout in enumerate(batch.rollouts):
        if int(batch.group_B[i]) >= groups:
            return
        ids = rollout.completion.token_ids
        tokens = [tokenizer.decode([token]) for token in ids]
        per_token = {
            name: [_short(x) for x in outputs[key][i, : len(ids)].tolist()]
            for name, key in (("process_reward", "process_BT"), ("advantage", "advantage_BT"))
            if outputs.get(key) is not None
        }
        yield {
            "iteration": iteration,
            "draw": rollout.prompt.draw,
            "source": rollout.prompt.source,
            "prompt": rollout.prompt.text,
            "answer": rollout.prompt.answer,
            "completion": rollout.completion.text,
            "tokens": tokens,
            "finish": str(rollout.completion.finish),
            "verdict": str(rollout.verdict.label),
            "score": rollout.verdict.score if rollout.verdict.known else None,
            **({"steps": steps(rollout, tokens)} if steps else {}),
            **per_token,
        }


def _short(x: float) -> float:
    """Five digits: half the file."""
    return float(f"{x:.5g}")


def _iteration(line: str) -> float:
    """Iteration of a line; infinite for a line that was cut off."""
    try:
        return float(json.loads(line)["iteration"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


class HuggingFaceExport(Callback):
    """Writes trained models as Hugging Face folders when training ends, with model cards, and the PRM's JSON file.

    Args:
        folder: Each role becomes a folder in it.
        roles: Which models: `policy`, `prm`.
        adapters: Write the adapters of a LoRA model alone; false merges them into a model that needs no `peft`.
    """

    def __init__(self, folder: str, roles: list[str] | None = None, adapters: bool = False) -> None:
        self.folder, self.roles = Path(folder), roles or ["policy"]
        self.write = save if adapters else save_merged

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if there are models already, which will be replaced."""
        there = [str(self.folder / role) for role in self.roles if (self.folder / role).exists()]
        if there and trainer.is_global_zero:
            warnings.warn(f"When training ends, new models will replace those in {', '.join(there)}.", stacklevel=2)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write them; weights are those of the last iteration."""
        facts = run_facts(pl_module)
        latest = self.folder / "policy" if "policy" in self.roles else None  # what the PRM was last compared with
        for role in self.roles:
            model = getattr(pl_module, role)
            if trainer.is_global_zero and model is not None:
                self.write(model.model, pl_module.tokenizer, self.folder / role)  # type: ignore[arg-type]
                reference = facts["names"].get("reference") or latest
                describe(self.folder / role, role, facts, None if reference is None else str(reference))


class PrimeProgress(ProgressBar):
    """A bar with accuracy, PRM accuracy, tokens per second and time left; plain lines where there is no terminal."""

    shown: tuple[str, ...] = ("rollout/accuracy", "val/pass1", "prm/accuracy", "loss", "rollout/tokens_per_second")

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None
        self._started = 0.0
        self._first = 0

    def disable(self) -> None:
        """Show nothing (ranks above 0)."""
        self.shown = ()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        self._started, self._first = time.monotonic(), trainer.global_step
        if trainer.is_global_zero and sys.stderr.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"))
            self._bar.start()
            self._task = self._bar.add_task(
                "iteration", total=_total(trainer), completed=trainer.global_step, numbers=""
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line."""
        if not trainer.is_global_zero or not self.shown:
            return
        numbers = "  ".join(self._numbers(trainer.callback_metrics))
        done, total = trainer.global_step, _total(trainer)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=numbers)
        elif done % max(1, total // 50) == 0 or done == total:
            pace = (time.monotonic() - self._started) / max(done - self._first, 1)
            print(
                f"iteration {done}/{total}  {numbers}  {pace:.2f} s each, {pace * (total - done):.0f} s left",
                flush=True,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def _numbers(self, metrics: Mapping[str, Tensor]) -> Iterator[str]:
        for name in self.shown:
            if name in metrics:
                yield f"{name} {float(metrics[name]):.4g}"

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _total(trainer: pl.Trainer) -> int:
    """Steps of the run."""
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 1
    limits = batches * epochs, trainer.max_steps  # -1 is no limit, of epochs and of steps
    return int(min((limit for limit in limits if 0 < limit < float("inf")), default=0))
