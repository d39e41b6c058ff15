"""Bars on a terminal, plain lines elsewhere: iterations, and what is going on inside of one.

Downloads and the loading of weights come before; `models/third_party_bars.py` has their bars.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text
from torch import Tensor

from prime_lightning.models.third_party_bars import ThirdPartyBar
from prime_lightning.sampling.acceptance import Tally
from prime_lightning.training.callbacks.heartbeat import Heartbeat
from prime_lightning.training.module import PrimeModule

DOING = {
    "sample": "sampling",
    "verify": "verifying",
    "score": "scoring",
    "prm": "training the PRM",
    "policy": "training the policy",
    "critic": "training the critic",
    "sync": "sending weights",
}
"""Timed phases in words."""
LINES = 50  # of a plain log, for steps that are shorter than an iteration of PRIME


class Count(MofNCompleteColumn):
    """`3/40`, and nothing where there is no end to count to."""

    def render(self, task: Task) -> Text:
        """The text."""
        return Text() if task.total is None else super().render(task)


class Bars(Progress):
    """Bars that ask what is going on each time they are drawn, with the last iteration's numbers below."""

    def __init__(self, poll: Callable[[Bars], None]) -> None:
        self.poll, self.numbers = poll, ""
        super().__init__(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(None, table_column=Column(max_width=40)),  # the only column that gives way on a narrow screen
            *(kind(table_column=Column(no_wrap=True)) for kind in (Count, TimeElapsedColumn)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=Console(stderr=True),
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars of now."""
        self.poll(self)
        yield from super().get_renderables()
        if self.numbers:
            yield Text(self.numbers)

    def show(self, task: TaskID, what: object, **state: Any) -> None:
        """Move a bar; one that turns to another thing starts its clock anew."""
        [bar] = [bar for bar in self.tasks if bar.id == task]
        if bar.fields.get("what") is not what:
            bar.start_time = self.get_time()
        self.update(task, what=what, **state)


class PrimeProgress(ProgressBar):
    """Iterations with accuracy, PRM accuracy, tokens per second and time left, and below them what is being done.

    Where there is no terminal: one line an iteration, or fifty lines of a supervised run; and one a minute that says
    what is being done, where nothing else was said.
    """

    shown: tuple[str, ...] = ("rollout/accuracy", "val/pass1", "prm/accuracy", "loss", "rollout/tokens_per_second")

    def __init__(self) -> None:
        super().__init__()
        self._bar: Bars | None = None
        self._heart: Heartbeat | None = None
        self._main = self._rollouts = self._phase = self._evaluation = TaskID(0)
        self._started = 0.0
        self._first = 0

    def disable(self) -> None:
        """Show nothing (ranks above 0)."""
        self.shown = ()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bars."""
        self._started, self._first = time.monotonic(), trainer.global_step
        word = "iteration" if isinstance(pl_module, PrimeModule) else "step"
        self._open(trainer, word, _total(trainer), trainer.global_step)
        if self._bar is None and trainer.is_global_zero and self.shown:
            self._heart = Heartbeat(lambda: _doing(trainer, word)).__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line."""
        if not trainer.is_global_zero or not self.shown:
            return
        numbers = "  ".join(self._numbers(trainer.callback_metrics))
        done, total = trainer.global_step, _total(trainer)
        every = 1 if isinstance(pl_module, PrimeModule) else max(1, total // LINES)
        if self._bar is not None:
            self._bar.numbers = numbers
            self._bar.update(self._main, completed=done)
        elif done % every == 0 or done == total:
            if self._heart is not None:
                self._heart.spoken()
            pace = (time.monotonic() - self._started) / max(done - self._first, 1)
            print(
                f"iteration {done}/{total}  {numbers}  {pace:.2f} s each, {pace * (total - done):.0f} s left",
                flush=True,
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A bar of the evaluation, below the others or alone."""
        batches = sum(trainer.num_val_batches or trainer.num_test_batches)
        if self._bar is None:
            self._open(trainer, "evaluating", batches, 0)
            self._evaluation = self._main
        else:
            self._evaluation = self._bar.add_task("evaluating", total=batches)

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move it."""
        if self._bar is not None:
            self._bar.advance(self._evaluation)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take it away; a plain log gets a line."""
        during_fit = trainer.state.fn == "fit"
        if self._bar is not None and during_fit:
            self._bar.remove_task(self._evaluation)
        elif self._bar is not None:
            self._close()
        elif during_fit and trainer.is_global_zero and self.shown:
            found = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            told = ("val/pass1",) if "val/pass1" in found else sorted(found)
            numbers = "  ".join(f"{name} {float(found[name]):.4g}" for name in told)
            print(f"evaluated after iteration {trainer.global_step}  {numbers}", flush=True)

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bars, after whatever other callbacks do when training ends."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def _open(self, trainer: pl.Trainer, word: str, total: float, completed: int) -> None:
        if not trainer.is_global_zero or not self.shown or not sys.stderr.isatty():
            return

        def poll(bars: Bars) -> None:
            tally = _tally(trainer)
            doing = _phase(trainer)
            bars.show(self._phase, doing, description=DOING.get(doing, doing), visible=bool(doing))
            bars.show(self._rollouts, tally, visible=tally is not None)
            if tally is not None:
                bars.update(self._rollouts, description=_rollouts(tally), completed=tally.accepted, total=tally.wanted)

        ThirdPartyBar.silent = True
        self._bar = Bars(lambda bars: None)
        self._main = self._bar.add_task(word, total=total, completed=completed)
        self._rollouts, self._phase = (self._bar.add_task("", total=None, visible=False) for _ in range(2))
        self._bar.poll = poll
        with _handlers_follow():
            self._bar.start()

    def _numbers(self, metrics: Mapping[str, Tensor]) -> Iterator[str]:
        for name in self.shown:
            if name in metrics:
                yield f"{name} {_number(float(metrics[name]))}"

    def _close(self) -> None:
        if self._heart is not None:
            self._heart.__exit__(None, None, None)
            self._heart = None
        if self._bar is not None:
            with _handlers_follow():
                self._bar.stop()
            self._bar, ThirdPartyBar.silent = None, False


@contextmanager
def _handlers_follow() -> Iterator[None]:
    """Take log handlers along when `sys.stderr` changes: what they write then goes above the bars, not through them."""
    before = sys.stderr
    yield
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)


def _tally(trainer: pl.Trainer) -> Tally | None:
    """Of the rollouts that are being sampled, by whatever part of the run."""
    places = trainer.train_dataloader, trainer.val_dataloaders, trainer.test_dataloaders, *trainer.callbacks  # type: ignore[attr-defined]
    return next(filter(None, (getattr(place, "tally", None) for place in places)), None)


def _phase(trainer: pl.Trainer) -> str:
    """What a module with a stepper does; empty for others, and between two phases."""
    return getattr(getattr(trainer.lightning_module, "stepper", None), "doing", "")


def _rollouts(tally: Tally) -> str:
    return DOING.get(tally.doing, tally.doing) + (f", accuracy {tally.accuracy:.2f}" if tally.known else "")


def _doing(trainer: pl.Trainer, word: str) -> str:
    """What a plain log says of an iteration that takes long."""
    tally, doing = _tally(trainer), _phase(trainer)
    parts = [DOING.get(doing, doing)] if doing else []
    if tally is not None:
        groups = f"{tally.accepted} of {tally.wanted} prompts" if tally.wanted else f"{tally.groups} prompts"
        parts.append(f"{_rollouts(tally)}, {groups}, {tally.tokens:,} tokens")
    return f"{word} {trainer.global_step + 1}/{_total(trainer)}: {'; '.join(parts) or 'at work'}"


def _number(value: float) -> str:
    """Four digits, and no exponent for what is merely large."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _total(trainer: pl.Trainer) -> int:
    """Steps of the run."""
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 1
    limits = batches * epochs, trainer.max_steps  # -1 is no limit, of epochs and of steps
    return int(min((limit for limit in limits if 0 < limit < float("inf")), default=0))
