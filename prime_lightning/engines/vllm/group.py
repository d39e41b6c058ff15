"""The processes of an engine as a group: end all of them, and leave none of the shared memory by which they talk.

vLLM's tensor-parallel workers map files in /dev/shm. What Python made there is removed by its resource tracker, a
process of the group that must outlive the others for that; what vLLM's C++ part made is removed by nobody but us.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

TRACKER = b"multiprocessing.resource_tracker"
PATIENCE = 2.0  # seconds that the resource tracker has


def members(group: int) -> dict[int, bytes]:
    """Live processes of a group and their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            pid = int(folder.name)
            command = (folder / "cmdline").read_bytes() if os.getpgid(pid) == group else b""
            if command:  # else it is of another group, or dead and not waited for
                found[pid] = command
    return found


def shared_memory(group: int) -> list[str]:
    """Files in /dev/shm that processes of a group have mapped."""
    return sorted(set().union(*map(mapped, members(group))))


def mapped(pid: int) -> set[str]:
    """Files in /dev/shm that a process has mapped."""
    with contextlib.suppress(OSError):  # it ended meanwhile
        names = [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        return {name for name in names if name.startswith("/dev/shm/")}
    return set()


def end(group: int, shared: Iterable[str] = ()) -> None:
    """Kill a group, but this process if it belongs to it, and remove its shared memory, but what this process uses.

    Args:
        group: Its id.
        shared: Shared memory that it is known to have had.
    """
    left = {*shared, *shared_memory(group)}
    while others := [pid for pid, command in members(group).items() if pid != os.getpid() and TRACKER not in command]:
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    deadline = time.monotonic() + PATIENCE
    while os.getpgrp() != group and members(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    if os.getpgrp() != group:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    own = set() if os.getpgrp() == group else mapped(os.getpid())  # shared with this process, which lives on
    for path in left - own:
        Path(path).unlink(missing_ok=True)
