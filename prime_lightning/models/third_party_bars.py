"""What other packages put on the screen: their bars as Rich bars on a terminal and nowhere else, and no advertising."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from typing import Any, ClassVar

import torch
import transformers
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tqdm.std import tqdm

TIPS = "lightning.pytorch.utilities.rank_zero"
"""The logger by which Lightning recommends other products."""


class ThirdPartyBar(tqdm):  # type: ignore[misc]
    """A `tqdm` that Rich draws, for downloads and for the loading and writing of weights; it goes away when done.

    Nothing is drawn where there is no terminal, or while a run has bars of its own (`silent`).
    """

    silent: ClassVar[bool] = False
    _screen: ClassVar[Progress | None] = None
    _lock_screen: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("name", None)  # the hub's, for switching groups of bars off
        wanted = transformers.utils.logging.is_progress_bar_enabled() and not self.silent
        hidden = not (wanted and sys.stderr.isatty())
        self._task: TaskID | None = None
        super().__init__(*args, **{**options, "gui": True, "disable": hidden or bool(options.get("disable"))})
        if self.disable:
            return
        with self._lock_screen:
            if ThirdPartyBar._screen is None:
                columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}")
                console = Console(stderr=True)
                ThirdPartyBar._screen = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
                ThirdPartyBar._screen.start()
                atexit.register(ThirdPartyBar.leave_screen)
            self._task = ThirdPartyBar._screen.add_task(self.desc or "", total=self.total, count=self._count())
        self.display()

    def display(self, *args: Any, **options: Any) -> None:
        """Show where it stands."""
        with self._lock_screen:
            if self._task is not None and ThirdPartyBar._screen is not None:
                ThirdPartyBar._screen.update(
                    self._task, description=self.desc or "", total=self.total, completed=self.n, count=self._count()
                )

    def close(self) -> None:
        """Take it away after a last look, and the screen with the last one."""
        super().close()
        self.display()
        with self._lock_screen:
            if self._task is not None and ThirdPartyBar._screen is not None:
                ThirdPartyBar._screen.refresh()
                ThirdPartyBar._screen.remove_task(self._task)
                self._task = None
                if not ThirdPartyBar._screen.tasks:
                    self.leave_screen()

    @classmethod
    def leave_screen(cls) -> None:
        """Give the terminal back."""
        with cls._lock_screen:
            if ThirdPartyBar._screen is not None:
                ThirdPartyBar._screen.stop()
                ThirdPartyBar._screen = None

    def _count(self) -> str:
        """`3/27`, or sizes."""
        written = [decimal(int(x)) if self.unit == "B" else f"{x:,}" for x in (self.n, self.total) if x is not None]
        return "/".join(written)


def quiet_libraries() -> None:
    """Make other packages as quiet as this one; the commands call it before anything else."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, where it is installed, warns of every CPU
    if not sys.stderr.isatty():
        os.environ.setdefault(
            "HF_DATASETS_DISABLE_PROGRESS_BARS", "1"
        )  # read when `datasets` is imported, which takes seconds
    transformers.utils.logging.set_tqdm_hook(_rich)
    logger = logging.getLogger(TIPS)
    if _no_tip not in logger.filters:
        logger.addFilter(_no_tip)


def _rich(factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A bar of transformers; a factory that is no class of tqdm is one that was switched off."""
    shown = isinstance(factory, type) and issubclass(factory, tqdm)
    return ThirdPartyBar(*args, **options) if shown else factory(*args, **options)


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip: " not in record.getMessage()
