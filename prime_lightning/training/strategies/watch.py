"""Ranks that watch each other, so that one that fails stops all of them, soon and with its message.

A rank that raises, is killed, or loses its node leaves the others in a collective that waits for it: for half an hour
under NCCL's default. Here every rank has a thread with a connection of its own to the store where the process group
met (torchrun's agent, or rank 0). It leaves a sign of life there each second and looks for bad news. On bad news it
prints them, closes the engine and the verifiers, and ends its process; nothing else works on a thread that is stuck in
a collective.

Leaves out: a rank whose Python hangs in one place gives signs of life. Engines and verifiers have time limits of their
own for that; for the rest there is the `timeout` of the process group.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

BEAT = 1.0  # seconds between two signs of life
GRACE = 5.0  # seconds for others to read bad news, and for engines to close
USES = itertools.count()  # of the store, by this process; all ranks use it equally often
STATUS = 2
"""Exit status of a rank that another one stopped."""


class RankWatch(Callback):
    """Stops all ranks when one fails. With a single process it does nothing; of several, the first one watches.

    Args:
        timeout: Seconds without a sign of life after which a rank counts as gone.

    Raises:
        ValueError: if `timeout` leaves no time for a sign of life.
    """

    def __init__(self, timeout: float = 120.0) -> None:
        if timeout < 3 * BEAT:
            raise ValueError(f"Expected a `timeout` of at least {3 * BEAT:g} seconds, got {timeout:g}.")
        self.timeout = timeout
        self.watch: Watch | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to watch."""
        self._begin(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others, and wait until they know it or `GRACE` is over."""
        with contextlib.suppress(RuntimeError):  # what went wrong may be the network
            self._begin(trainer)  # it may have failed before `setup`
        if self.watch is not None:
            self.watch.fail(f"{type(exception).__name__}: {exception}")
            self.watch = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching once all ranks have come here."""
        if self.watch is not None:
            self.watch.finish()
            self.watch = None

    def _begin(self, trainer: pl.Trainer) -> None:
        first = next(c for c in trainer.callbacks if isinstance(c, RankWatch))  # type: ignore[attr-defined]
        if self is first and self.watch is None and trainer.world_size > 1 and dist.is_initialized():
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            close = data.close if hasattr(data, "close") else lambda: None
            run = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(USES)}"
            self.watch = Watch(trainer.global_rank, trainer.world_size, self.timeout, close, run)


class Watch:
    """The thread of one rank.

    Args:
        rank: Of this process.
        world: Number of ranks.
        timeout: Seconds without a sign of life after which a rank counts as gone.
        close: Called before the process ends because of another one.
        run: The same on all ranks, another one for each use of the store.
    """

    def __init__(self, rank: int, world: int, timeout: float, close: Callable[[], None], run: str) -> None:
        self.rank, self.world, self.timeout, self.close = rank, world, timeout, close
        # a connection of its own: one that is shared waits while the trainer's thread waits
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=timeout),
        )
        self._store = PrefixStore(f"prime_lightning/watch/{run}", store)
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[str, float]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="rank watch", daemon=True)
        self._thread.start()

    def fail(self, message: str) -> None:
        """Leave a message for the other ranks; the first one counts."""
        self._over.set()
        mine = f"rank {self.rank} of {self.world} stopped: {message}"
        with self._lock, contextlib.suppress(RuntimeError):  # the store is gone, which the others see for themselves
            if self._store.compare_set("failure", "", mine).decode(errors="replace") != mine:
                self._store.add("informed", 1)
                return
            end = time.monotonic() + GRACE
            while self._store.add("informed", 0) < self.world - 1 and time.monotonic() < end:
                time.sleep(BEAT / 5)

    def finish(self) -> None:
        """Wait for all ranks to come here, or for bad news; the store may live in the first to leave."""
        self._meet("finished", float("inf"))
        self._over.set()
        with contextlib.suppress(RuntimeError):
            self._meet("left", GRACE if self.rank == 0 else 0.0)

    def _meet(self, name: str, seconds: float) -> None:
        """Count this rank in, and wait that long for the others."""
        with self._lock:
            here = self._store.add(name, 1)
        end = time.monotonic() + seconds
        while here < self.world and time.monotonic() < end:
            time.sleep(BEAT / 10)
            with self._lock:
                here = self._store.add(name, 0)

    def _loop(self) -> None:
        while not self._over.wait(BEAT):
            news = self._news()
            if news is not None and not self._over.is_set():
                self._stop(news)

    def _news(self) -> str | None:
        """Leave a sign of life; returns what is wrong, if something is."""
        try:
            with self._lock:
                self._store.set(f"alive/{self.rank}", str(time.monotonic_ns()))
                if self._store.check(["failure"]):
                    self._store.add("informed", 1)
                    return self._store.get("failure").decode(errors="replace")
                return self._silent()
        except RuntimeError as error:  # torch's own errors of the network are RuntimeErrors
            return f"the store of rank 0 or of its launcher is gone ({str(error).splitlines()[0]})"

    def _silent(self) -> str | None:
        """A rank without a new sign of life: rank 0 looks after all, the others after rank 0."""
        now = time.monotonic()
        for rank in range(1, self.world) if self.rank == 0 else (0,):
            key = f"alive/{rank}"
            sign = self._store.get(key).decode() if self._store.check([key]) else ""
            if not sign or self._seen.get(rank, ("", 0.0))[0] != sign:  # one that has not begun may load for long
                self._seen[rank] = sign, now
            if now - self._seen[rank][1] > self.timeout:
                news = f"rank {rank} of {self.world} gave no sign of life for {self.timeout:g} s"
                self._store.compare_set("failure", "", news)
                return news
        return None

    def _stop(self, news: str) -> None:
        """End this process: its own thread may be waiting for a rank that never comes."""
        print(f"prime-lightning: rank {self.rank} stops, because {news}", file=sys.stderr, flush=True)
        closing = threading.Thread(target=self.close, daemon=True)
        closing.start()
        closing.join(GRACE)
        sys.stdout.flush()
        os._exit(STATUS)
