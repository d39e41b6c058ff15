"""Sampling the next batches while the trainer works on this one (asynchronous mode, `data.max_staleness` above 0).

A thread fills batches ahead of the trainer, at most `max_staleness` of them, the one it is at included. New weights
reach the engine between its steps, so a batch that is trained on in iteration i was begun no earlier than with the
weights of iteration i - max_staleness, and each token carries the version that sampled it. The importance correction of
the policy loss takes up the difference. Groups that were left over by then wait for a later batch; those that would be
older than `max_staleness` when it is trained on are dropped and counted.

Resume: what was sampled ahead and not trained on is sampled again, from the same prompts, with the weights of the
checkpoint. A resumed asynchronous run is therefore not bit-equal to one that was not stopped; a synchronous one is.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from queue import Empty, Queue
from typing import Any

from prime_lightning.models.batch import Batch
from prime_lightning.sampling.acceptance import Tally
from prime_lightning.sampling.loader import TrainingLoader

POLL_SECONDS = 0.2


class AheadLoader:
    """Takes batches of a `TrainingLoader` from a thread.

    Args:
        loader: Fills one batch at a time.
        ahead: Batches that may be begun before the trainer asks for them, at least 1.
    """

    def __init__(self, loader: TrainingLoader, ahead: int) -> None:
        assert ahead >= 1
        self.loader, self.ahead = loader, ahead
        self._taken: dict[str, Any] = loader.state_dict()

    def __len__(self) -> int:
        """As the loader's."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        filled: Queue[tuple[Batch | BaseException, dict[str, Any]]] = Queue()
        allowed, stop = threading.Semaphore(self.ahead), threading.Event()
        thread = threading.Thread(target=self._fill, args=(filled, allowed, stop), name="sampling ahead", daemon=True)
        thread.start()
        try:
            while True:
                batch, state = self._next(filled, thread)
                if isinstance(batch, BaseException):
                    raise batch
                self._taken = state
                allowed.release()
                yield batch
        finally:
            stop.set()
            allowed.release()
            thread.join()

    @property
    def tally(self) -> Tally | None:
        """Of the batch that is being filled."""
        return self.loader.tally

    def _fill(self, filled: Queue[Any], allowed: threading.Semaphore, stop: threading.Event) -> None:
        iterations = itertools.count(self.loader.source.engine.version)
        try:
            while allowed.acquire() and not stop.is_set():
                batch = self.loader.collect(trained_at=next(iterations))
                filled.put((batch, self.loader.state_dict()))
        except BaseException as error:  # the trainer's thread raises it
            filled.put((error, {}))

    def _next(
        self, filled: Queue[tuple[Batch | BaseException, dict[str, Any]]], thread: threading.Thread
    ) -> tuple[Batch | BaseException, dict[str, Any]]:
        while True:
            with contextlib.suppress(Empty):
                return filled.get(timeout=POLL_SECONDS)
            assert thread.is_alive() or not filled.empty()

    def state_dict(self) -> dict[str, Any]:
        """The loader's state behind the last batch that was taken."""
        return self._taken

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.loader.load_state_dict(state)
        self._taken = self.loader.state_dict()
