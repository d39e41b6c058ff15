"""A zygote: started by exec, never forked from the trainer; imports once, then forks a child for each job or worker.

Protects: holds no job's data. Sources, tests and inputs arrive as descriptors that it passes on unread, so no child
can find another's in inherited memory. It kills what outlives its wall time, and ends with all its children when the
control channel closes, be it by `close` or by the trainer's death.
Leaves out: judging. It reports how a child ended;
what that means is decided outside.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from prime_lightning.verifiers.jail import library, wire
from prime_lightning.verifiers.jail.cage import Cage

Start = Callable[[Cage, dict[str, Any], list[int]], list[int]]
"""Starts a job's children with its descriptors; returns their process ids, the one that ends the job first."""


def fork(run: Callable[[], None]) -> int:
    """A child that runs `run` and never returns from it.

    Returns:
        Its process id, in the parent.
    """
    child = os.fork()
    if child == 0:
        leave = os._exit
        try:
            run()
        except BaseException:
            leave(70)
        finally:
            leave(70)
    return child


class _Children:
    """The running job's processes, waited for together with the control channel."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler must stand for the wake-up descriptor to be written
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(control.fileno(), select.POLLIN)

    def wait(self, pids: list[int], deadline: float) -> dict[str, Any]:
        """Until the first of `pids` has ended, the deadline or an abort message comes; then the others are killed."""
        ended: dict[int, list[float]] = {}
        stopped = ""
        while len(ended) < len(pids):
            for pid in pids:
                if pid not in ended:
                    done, status, usage = os.wait4(pid, os.WNOHANG)
                    if done:
                        ended[pid] = [status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]
            if len(ended) == len(pids):
                break
            if pids[0] in ended or stopped:
                self._kill(pids, ended)
            else:
                stopped = self._sleep(deadline)
        statuses = [ended[pid] for pid in pids]
        return {"stopped": stopped, "ended": statuses}

    def _sleep(self, deadline: float) -> str:
        events = dict(self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self._wake in events:
            os.read(self._wake, 4096)
        if self._control.fileno() in events:  # any message while a job runs means: abort
            wire.read_frame(self._control.fileno())
            return "abort"
        return "" if events else "wall"

    def _kill(self, pids: list[int], ended: dict[int, list[float]]) -> None:
        for pid in pids:
            if pid not in ended:
                os.kill(pid, signal.SIGKILL)
                _, status, usage = os.wait4(pid, 0)
                ended[pid] = [status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]


def _serve_jobs(control: socket.socket, cage: Cage, start: Start) -> None:
    children = _Children(control)
    while True:
        message, descriptors = wire.receive_with_descriptors(control, 8)
        if message == wire.ABORT:
            continue  # it crossed the report of a job that had just ended
        job = json.loads(message)
        pids = start(cage, job, descriptors)  # it closes the descriptors
        report = children.wait(pids, time.monotonic() + job["wall_seconds"])
        wire.write_frame(control.fileno(), json.dumps(report).encode())


def _serve_workers(control: socket.socket, cage: Cage, start: Start) -> None:
    """Fork long-lived workers that talk to the supervisor directly; it watches and kills them by their pidfd."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    while True:
        message, descriptors = wire.receive_with_descriptors(control, 8)
        (pid,) = start(cage, json.loads(message), descriptors)
        handles = [os.pidfd_open(pid)] if hasattr(os, "pidfd_open") else []
        wire.send_with_descriptors(control, json.dumps({"pid": pid}).encode(), handles)
        for handle in handles:
            os.close(handle)


def main(config: dict[str, Any]) -> None:
    """Import what `config["grader"]` names, lock up, serve until the control channel closes."""
    library.open_up(config["tier"], other_user=config["uid"] is not None)
    for name in config["modules"]:
        importlib.import_module(name)
    grader = importlib.import_module(f"prime_lightning.verifiers.jail.graders.{config['grader']}")
    grader.prepare(config)
    control = socket.socket(fileno=config["control"])
    cage = Cage(config)
    gc.collect()
    gc.freeze()  # objects of now stay shared between children: the collector does not touch them
    gc.disable()
    wire.write_frame(control.fileno(), b'{"ready":true}')
    try:
        (_serve_workers if grader.PERSISTENT else _serve_jobs)(control, cage, grader.start)
    except (EOFError, OSError):
        os._exit(0)
