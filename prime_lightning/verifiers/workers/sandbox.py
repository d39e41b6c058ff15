"""A zygote from outside: start it in a jail, hand it jobs, collect what they write, kill it.

Protects: the caller. A job that floods is aborted, a zygote that is silent or gone is `WorkerDied`, and nothing of a
job stays behind. Verdicts do not rest on the walls: expected values never enter a zygote or its children in any tier.
What the walls keep off stands in `jail/cage.py`, how they are built in `workers/launch.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import tempfile
import time
import weakref
from dataclasses import dataclass
from typing import Any

from prime_lightning.verifiers.jail import wire
from prime_lightning.verifiers.workers.launch import ZygoteSpec, command_line, environment
from prime_lightning.verifiers.workers.pool import WorkerDied

_START_SECONDS = 60.0
_PATIENCE_SECONDS = 10.0  # a zygote that is silent so long after a job's deadline is stuck
_live: weakref.WeakSet[Zygote] = weakref.WeakSet()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a job's processes ended.

    Example:
        >>> Report(stopped="", statuses=(0,), cpu_seconds=(0.01,), output=b"").clean
        True
    """

    stopped: str
    """Who ended it: empty for itself, `wall` for the wall limit, `output` for too much output."""
    statuses: tuple[int, ...]
    """Wait statuses; the deciding process first."""
    cpu_seconds: tuple[float, ...]
    output: bytes

    @property
    def clean(self) -> bool:
        """Whether the first process ended by itself with exit code 0."""
        return not self.stopped and self.statuses[0] == 0


def memory_file(content: bytes) -> int:
    """A descriptor, at its start, of an unnamed file in memory (a deleted temporary file where there is no memfd)."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("job", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class Zygote:
    """A started zygote. Not thread-safe: one job at a time.

    Args:
        tier: One of `launch.TIERS`, or `limits`.
        spec: What it is for.

    Raises:
        WorkerDied: It did not start; the message has the end of its standard error.
    """

    def __init__(self, tier: str, spec: ZygoteSpec) -> None:
        self.tier = tier
        self._broken = False
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._process = subprocess.Popen(
                command_line(tier, spec, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=None if spec.inherits else environment(),
                cwd=None if spec.inherits else "/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer, which then closes us
            )
        except BaseException:
            self.control.close()
            raise
        finally:
            theirs.close()
        _live.add(self)
        self._await_ready()

    def _await_ready(self) -> None:
        errors = self._process.stderr
        assert errors is not None
        ready = b""
        if wire.readable(self.control.fileno(), _START_SECONDS):
            with contextlib.suppress(EOFError, ValueError, OSError):
                ready = wire.read_frame(self.control.fileno(), 256)
        if not ready:
            self._process.kill()
            said = errors.read().decode(errors="replace").strip()
            self.close()
            raise WorkerDied(f"the {self.tier} jail did not start: {said[-600:] or 'no message'}")
        errors.close()

    def run(self, job: dict[str, Any], descriptors: list[int], output: int, *, most_output: int) -> Report:
        """Run one job to its end.

        Args:
            job: What the grader's `start` reads, with `wall_seconds`.
            descriptors: Handed to the job; closed here.
            output: Read end of the pipe that the job writes to; closed here.
            most_output: Bytes after which the job is killed.

        Raises:
            WorkerDied: The zygote is gone or silent.
        """
        try:
            wire.send_with_descriptors(self.control, json.dumps(job).encode(), descriptors)
        except OSError as error:
            os.close(output)
            raise WorkerDied(f"the jail is gone: {error}") from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        try:
            return self._collect(output, most_output, time.monotonic() + job["wall_seconds"] + _PATIENCE_SECONDS)
        finally:
            os.close(output)

    def _collect(self, output: int, most_output: int, deadline: float) -> Report:
        poll = select.poll()
        poll.register(output, select.POLLIN | select.POLLHUP)
        poll.register(self.control.fileno(), select.POLLIN | select.POLLHUP)
        collected = bytearray()
        flooded = False
        while True:
            events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not events:
                raise WorkerDied("the jail is silent")
            if output in events:
                part = os.read(output, 1 << 16)
                collected += part
                flooded = len(collected) > most_output
                if flooded or not part:
                    poll.unregister(output)
                if flooded:
                    self._abort()
            elif (
                self.control.fileno() in events
            ):  # only once the output is drained: what was written before the end counts
                return self._report(bytes(collected), flooded)

    def _abort(self) -> None:
        try:
            wire.write_frame(self.control.fileno(), wire.ABORT)
        except OSError as error:
            raise WorkerDied(f"the jail is gone: {error}") from None

    def _report(self, output: bytes, flooded: bool) -> Report:
        try:
            said = json.loads(wire.read_frame(self.control.fileno(), 1 << 16))
            ended = said["ended"]
            return Report(
                stopped="output" if flooded else str(said["stopped"]),
                statuses=tuple(int(entry[0]) for entry in ended),
                cpu_seconds=tuple(float(entry[1]) for entry in ended),
                output=output,
            )
        except (EOFError, OSError, ValueError, LookupError, TypeError) as error:
            raise WorkerDied(f"the jail broke off: {error!r}") from None

    def kill(self) -> None:
        """End it now, whatever it does; any thread may. The owner's next call raises `WorkerDied`."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def close(self) -> None:
        """Kill it, reap it, close its channel. The owner's call, as often as wanted."""
        self.kill()
        self._process.wait()
        self.control.close()
        if self._process.stderr is not None:
            self._process.stderr.close()
        _live.discard(self)

    def forget(self) -> None:
        """In a process forked from the owner: drop the copies of its descriptors, leave the zygote alone."""
        self.control.close()


def _forget_all() -> None:
    for zygote in list(_live):
        zygote.forget()
    _live.clear()


os.register_at_fork(after_in_child=_forget_all)
