"""Long-lived workers forked from one warm zygote, watched by their CPU time and killed from outside.

Protects: a question never takes longer than its limits plus the time of a kill, whatever the worker is doing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import struct
import threading
import time

from prime_lightning.verifiers.jail import wire
from prime_lightning.verifiers.workers.launch import ZygoteSpec, machine_tiers
from prime_lightning.verifiers.workers.pool import WorkerDied
from prime_lightning.verifiers.workers.sandbox import Zygote

_log = logging.getLogger(__name__)
_SPAWN_SECONDS = 20.0
_FRAME_SECONDS = 10


class TimedOut(Exception):  # noqa: N818  (what happened)
    """The question took more than its CPU or wall time; the worker was killed."""


class WorkerCrashed(WorkerDied):
    """The worker ended while it was working on a question."""


class ForkServer:
    """One zygote and the workers forked from it. Thread-safe.

    Args:
        spec: What its zygote is for: a grader of `jail/` with persistent workers.
        protected: False: no walls at all; the worker is an ordinary process with the trainer's rights.
        memory_bytes: Address space of each worker.
    """

    def __init__(self, spec: ZygoteSpec, *, protected: bool, memory_bytes: int) -> None:
        self._spec = spec
        self._tiers = (*machine_tiers(), "limits") if protected else ("limits",)
        self._memory = memory_bytes
        self._zygote: Zygote | None = None
        self._lock = threading.Lock()
        self._closed = False

    def spawn(self) -> tuple[socket.socket, int, int]:
        """A fresh worker: its channel, its pidfd (-1 where there is none) and its process id as we see it.

        Raises:
            WorkerDied: Neither this zygote nor a new one gives one.
        """
        with self._lock:
            if self._zygote is not None:
                with contextlib.suppress(OSError, EOFError, ValueError):
                    return self._spawn(self._zygote)
                self._zygote.close()  # dead, as all its workers are, of which one may just have been missed
            self._zygote = None
            if self._closed:
                raise WorkerDied("the workers are closed")
            self._zygote = self._start()
            try:
                return self._spawn(self._zygote)
            except (OSError, EOFError, ValueError) as error:
                raise WorkerDied(f"the jail gives no worker: {error!r}") from None

    def _start(self) -> Zygote:
        """The first tier that starts. No program of a model runs here, so any tier will do; the better the better."""
        failures = []
        for tier in self._tiers:
            try:
                zygote = Zygote(tier, self._spec)
            except WorkerDied as error:
                failures.append(str(error))
            else:
                self._tiers = (tier,)
                _log.info("%s workers run in a %s jail", self._spec.module, tier)
                return zygote
        raise WorkerDied("; ".join(failures))

    def _spawn(self, zygote: Zygote) -> tuple[socket.socket, int, int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # half a frame must not block us
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _FRAME_SECONDS, 0))
        try:
            job = json.dumps({"memory_bytes": self._memory}).encode()
            wire.send_with_descriptors(zygote.control, job, [theirs.fileno()])
            if not wire.readable(zygote.control.fileno(), _SPAWN_SECONDS):
                raise OSError("silence")
            message, handles = wire.receive_with_descriptors(zygote.control, 1)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if not handles:
            return ours, -1, json.loads(message)["pid"]
        return ours, handles[0], _pid_of(handles[0])

    def kill(self) -> None:
        """No worker starts any more, and all of them end with their zygote."""
        self._closed = True
        if self._zygote is not None:
            self._zygote.kill()

    def close(self) -> None:
        """End the zygote and its workers."""
        with self._lock:
            self._closed = True
            if self._zygote is not None:
                self._zygote.close()
                self._zygote = None


def _pid_of(handle: int) -> int:
    """The process id behind a pidfd in our own namespace (the zygote may live in another)."""
    with open(f"/proc/self/fdinfo/{handle}") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))


class PersistentWorker:
    """A worker that answers questions one after another; replaced when it is killed, old or fat.

    Args:
        fork_server: Where workers come from.
        most_answers: Answers after which it is replaced, against memory that creeps up.
        most_megabytes: Resident size after which it is replaced.
    """

    def __init__(self, fork_server: ForkServer, *, most_answers: int = 2000, most_megabytes: int = 1200) -> None:
        self._fork_server = fork_server
        self._most_answers, self._most_megabytes = most_answers, most_megabytes
        self._channel: socket.socket | None = None
        self._handle, self._pid, self._answers = -1, 0, 0
        self._lock = threading.Lock()
        self._spawn()

    def _spawn(self) -> None:
        channel, handle, pid = self._fork_server.spawn()
        with self._lock:
            self._channel, self._handle, self._pid, self._answers = channel, handle, pid, 0

    def ask(self, question: bytes, *, cpu_seconds: float, wall_seconds: float) -> object:
        """Ask; wait for the answer.

        Args:
            question: What the grader's worker reads.
            cpu_seconds: CPU time after which the worker is killed.
            wall_seconds: The same in wall time.

        Returns:
            The first element of the worker's answer.

        Raises:
            TimedOut: It took too long.
            WorkerCrashed: It ended on this question.
            WorkerDied: There is no worker to be had.
        """
        if self._channel is None:
            self._spawn()
        assert self._channel is not None
        channel = self._channel.fileno()
        try:
            wire.write_frame(channel, question)
            if not self._wait(channel, cpu_seconds, wall_seconds):
                self._end()
                raise TimedOut
            answer, megabytes = wire.loads(wire.read_frame(channel, 1 << 16))
        except (OSError, EOFError, ValueError, TypeError) as error:
            self._end()
            raise WorkerCrashed(f"the worker broke off: {error!r}") from None
        self._answers += 1
        if self._answers >= self._most_answers or megabytes > self._most_megabytes:
            self._end()
        return answer

    def _cpu(self) -> float:
        """CPU seconds of the worker so far; of the wall clock where the machine cannot say."""
        try:
            return time.clock_gettime(
                (~self._pid << 3) | 2
            )  # the clock id of a process, as clock_getcpuclockid(3) makes it
        except OSError:
            return time.monotonic()

    def _wait(self, channel: int, cpu_seconds: float, wall_seconds: float) -> bool:
        """Whether an answer comes in time. CPU time runs no faster than the wall, so it is looked at seldom."""
        begun, cpu = time.monotonic(), self._cpu()
        while True:
            left = min(cpu_seconds - (self._cpu() - cpu), wall_seconds - (time.monotonic() - begun))
            if left <= 0:
                return False
            if wire.readable(channel, max(left, 0.005)):
                return True

    def _end(self) -> None:
        self.kill()
        with self._lock:
            channel, handle, self._channel, self._handle = self._channel, self._handle, None, -1
        if channel is not None:
            channel.close()
        if handle >= 0:
            os.close(handle)

    def kill(self) -> None:
        """Kill the process; any thread may."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._handle >= 0:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            elif self._channel is not None and self._pid:
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill it and free its descriptors."""
        self._end()
