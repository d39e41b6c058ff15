"""A pool of killable workers: threads of the trainer, each the owner of one worker process.

Order: jobs start in the order of submission, and each answers through its own future. Memory is bounded: `submit`
blocks while `pending` jobs wait. A worker that dies is replaced and its job tried once more; then the job fails with
`WorkerDied`.
Leaves out: time limits (a job keeps its own, in its worker) and what a job does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

_log = logging.getLogger(__name__)


class WorkerDied(Exception):  # noqa: N818  (what happened)
    """A worker process is gone or could not start: a failure of ours, never of what it graded."""


class Worker(Protocol):
    """What a pool needs of a worker. `kill` is called from any thread, `close` by the owner only."""

    def kill(self) -> None:
        """End the process now; a running call then raises `WorkerDied`."""

    def close(self) -> None:
        """Kill, reap and free everything."""


W = TypeVar("W", bound=Worker)
R = TypeVar("R")


class Pool(Generic[W]):
    """Workers, started by their threads when the first job comes.

    Args:
        start: Makes a worker; raises `WorkerDied` when it cannot.
        workers: How many.
        pending: Jobs that may wait before `submit` blocks.

    Example:
        >>> class Echo:
        ...     def kill(self) -> None: ...
        ...     def close(self) -> None: ...
        >>> pool = Pool(Echo, workers=1, pending=8)
        >>> pool.submit(lambda worker: 6 * 7).result()
        42
        >>> pool.close()
    """

    def __init__(self, start: Callable[[], W], *, workers: int, pending: int) -> None:
        if workers < 1 or pending < 1:
            raise ValueError(f"Expected `workers` and `pending` of at least 1, got {workers} and {pending}.")
        self.restarts = 0
        """Workers that died and were replaced."""
        self._start = start
        self._count = workers
        self._room = threading.BoundedSemaphore(pending)
        self._jobs: queue.SimpleQueue[tuple[Callable[[W], Any], Future[Any], bool] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._workers: dict[int, W] = {}
        self._closed = False
        self._owner = os.getpid()

    def submit(self, job: Callable[[W], R]) -> Future[R]:
        """Run `job` on some worker. Blocks while too many wait, unless the caller is one of the pool's own threads.

        Raises:
            RuntimeError: The pool is closed.
        """
        future: Future[R] = Future()
        counted = threading.current_thread() not in self._threads
        if counted:
            self._room.acquire()
        with self._lock:
            if self._closed:
                if counted:
                    self._room.release()
                raise RuntimeError("The pool of verifier workers is closed.")
            self._launch()
            self._jobs.put((job, future, counted))
        return future

    def _launch(self) -> None:
        if not self._threads:
            for number in range(self._count):
                thread = threading.Thread(target=self._serve, args=(number,), name=f"verifier-{number}", daemon=True)
                self._threads.append(thread)
            for thread in self._threads:
                thread.start()

    def _serve(self, number: int) -> None:
        while (entry := self._jobs.get()) is not None:
            job, future, counted = entry
            if counted:
                self._room.release()
            if future.set_running_or_notify_cancel():
                self._answer(number, job, future)
            del entry, job, future  # what a job holds must not live until the next one comes
        self._retire(number)

    def _answer(self, number: int, job: Callable[[W], R], future: Future[R]) -> None:
        for attempt in (1, 2):
            try:
                future.set_result(job(self._worker(number)))
            except WorkerDied as error:
                self._retire(number)
                if attempt == 2 or self._closed:
                    future.set_exception(error)
                    return
                self.restarts += 1
                _log.warning("a verifier worker died and is replaced: %s", error)
            except BaseException as error:
                future.set_exception(error)
                return
            else:
                return

    def _worker(self, number: int) -> W:
        if number not in self._workers:
            worker = self._start()
            with self._lock:
                closed = self._closed
                if not closed:
                    self._workers[number] = worker
            if closed:
                worker.close()
                raise WorkerDied("the pool is closed")
        return self._workers[number]

    def _retire(self, number: int) -> None:
        with self._lock:
            worker = self._workers.pop(number, None)
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """Drop what waits (its futures are cancelled), kill what runs, leave nothing behind. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if os.getpid() != self._owner:
                return  # a forked copy: the threads and workers are the parent's
            waiting = self._drain()
            for worker in self._workers.values():
                worker.kill()
            for _ in self._threads:
                self._jobs.put(None)
        for future in waiting:
            future.cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _drain(self) -> list[Future[Any]]:
        waiting = []
        with contextlib.suppress(queue.Empty):
            while entry := self._jobs.get_nowait():
                waiting.append(entry[1])
                if entry[2]:
                    self._room.release()
        return waiting
