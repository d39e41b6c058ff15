"""The pool: order, back-pressure, replacement of dead workers, clean ends."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest

from prime_lightning.verifiers.workers.pool import Pool, WorkerDied


class Fake:
    """A worker that counts."""

    def __init__(self) -> None:
        self.killed = threading.Event()
        self.closed = 0

    def kill(self) -> None:
        self.killed.set()

    def close(self) -> None:
        self.closed += 1


def made(workers: int = 2, pending: int = 64) -> tuple[Pool[Fake], list[Fake]]:
    started: list[Fake] = []

    def start() -> Fake:
        started.append(Fake())
        return started[-1]

    return Pool(start, workers=workers, pending=pending), started


def test_results_are_each_its_own_and_start_in_order() -> None:
    pool, _ = made(workers=1)
    begun: list[int] = []

    def job(n: int) -> Callable[[Fake], int]:
        return lambda worker: begun.append(n) or n * n

    futures = [pool.submit(job(n)) for n in range(50)]
    assert [future.result() for future in futures] == [n * n for n in range(50)]
    assert begun == list(range(50))
    pool.close()


def test_workers_start_with_the_first_job_and_are_closed_once() -> None:
    pool, started = made()
    assert not started
    barrier = threading.Barrier(2)
    for future in [pool.submit(lambda worker: barrier.wait(10)) for _ in range(2)]:
        future.result()
    assert len(started) == 2
    pool.close()
    pool.close()
    assert [worker.closed for worker in started] == [1, 1]


def test_submit_waits_while_too_many_wait() -> None:
    pool, _ = made(workers=1, pending=2)
    go = threading.Event()
    running = pool.submit(lambda worker: go.wait(30))
    while not running.running():
        time.sleep(0.001)
    for _ in range(2):
        pool.submit(lambda worker: None)
    third = threading.Thread(target=pool.submit, args=(lambda worker: None,))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    go.set()
    third.join(10)
    assert not third.is_alive()
    pool.close()


def test_a_job_may_submit_another_even_when_full() -> None:
    """A callback runs in a worker's thread: if it had to wait for room, nobody could make any."""
    pool, _ = made(workers=1, pending=1)
    inner = pool.submit(lambda worker: [pool.submit(lambda w: 7) for _ in range(5)]).result(10)
    assert [future.result(10) for future in inner] == [7] * 5
    pool.close()


def test_a_dead_worker_is_replaced_and_the_job_tried_once_more() -> None:
    pool, started = made(workers=1)
    tries: list[Fake] = []

    def fails_once(worker: Fake) -> int:
        tries.append(worker)
        if len(tries) == 1:
            raise WorkerDied("first")
        return 5

    assert pool.submit(fails_once).result() == 5
    assert tries == started
    assert started[0].closed == 1
    assert pool.restarts == 1

    def fails_always(worker: Fake) -> int:
        raise WorkerDied("again")

    with pytest.raises(WorkerDied, match="again"):
        pool.submit(fails_always).result()
    assert pool.submit(lambda worker: 6).result() == 6
    pool.close()


def test_other_exceptions_are_the_jobs_own() -> None:
    pool, started = made(workers=1)
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda worker: 1 / 0).result()
    assert pool.submit(lambda worker: 1).result() == 1
    assert len(started) == 1
    pool.close()


def test_close_cancels_what_waits_and_kills_what_runs() -> None:
    pool, started = made(workers=1)

    def hangs(worker: Fake) -> None:
        worker.killed.wait(30)
        raise WorkerDied("killed")

    running = pool.submit(hangs)
    while not running.running():
        time.sleep(0.001)
    waiting = pool.submit(lambda worker: 1)
    pool.close()
    with pytest.raises(WorkerDied):
        running.result(1)
    with pytest.raises(CancelledError):
        waiting.result(1)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(lambda worker: 1)
    assert [worker.closed for worker in started] == [1]
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("verifier-") and thread in pool._threads
    ]


def test_closing_frees_a_caller_that_waits_for_room() -> None:
    pool, _ = made(workers=1, pending=1)
    running = pool.submit(lambda worker: worker.killed.wait(30))
    while not running.running():
        time.sleep(0.001)
    pool.submit(lambda worker: None)
    told: list[str] = []

    def caller() -> None:
        try:
            pool.submit(lambda worker: None)
        except RuntimeError as error:
            told.append(str(error))

    thread = threading.Thread(target=caller)
    thread.start()
    pool.close()
    thread.join(10)
    assert told == ["The pool of verifier workers is closed."]


def test_a_cancelled_job_does_not_run() -> None:
    pool, _ = made(workers=1)
    go = threading.Event()
    ran: list[int] = []
    pool.submit(lambda worker: go.wait(30))
    second = pool.submit(lambda worker: ran.append(1))
    assert second.cancel()
    go.set()
    pool.submit(lambda worker: None).result()
    assert not ran
    pool.close()


def test_what_a_job_holds_is_let_go() -> None:
    pool, _ = made(workers=1)

    class Big:
        pass

    big = Big()
    seen = weakref.ref(big)
    pool.submit(lambda worker, held=big: None).result()
    del big
    for _ in range(100):
        gc.collect()
        if seen() is None:
            break
        time.sleep(0.01)
    assert seen() is None
    pool.close()


@pytest.mark.parametrize(("workers", "pending"), [(0, 1), (1, 0)])
def test_sizes_are_checked(workers: int, pending: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        made(workers, pending)
