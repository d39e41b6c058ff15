"""Long work says where it is at least once a minute: for logs in files, which have no bars."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

SECONDS = 60.0
"""Longest silence."""


class Heartbeat:
    """A thread that prints a line whenever nothing was said for a while; a context manager.

    Args:
        say: What is printed; an empty line is left out.
        seconds: Longest silence.

    Example:
        >>> with Heartbeat(lambda: "still there", seconds=0.5):
        ...     time.sleep(0.8)
        still there
    """

    def __init__(self, say: Callable[[], str], seconds: float | None = None) -> None:
        self._say, self._seconds = say, SECONDS if seconds is None else seconds
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def spoken(self) -> None:
        """Something else was printed: the silence begins anew."""
        self._last = time.monotonic()

    def _beat(self) -> None:
        while not self._ended.wait(max(0.0, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last >= self._seconds:
                self.spoken()
                line = self._say()
                if line:
                    print(line, flush=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()


def minutes(seconds: float) -> str:
    """A rough time for readers.

    Example:
        >>> minutes(40), minutes(200), minutes(9000)
        ('40 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
