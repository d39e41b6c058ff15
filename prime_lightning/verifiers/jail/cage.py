"""The walls around one process: made once in the zygote, entered by each child after the fork, before hostile code.

Protects: no privileges, no second process, no socket, no files but the standard library for reading, no writes, no
view of other processes, bounded memory, CPU time, threads and open files; descriptors that are not handed in are
closed.
Leaves out: wall time (the zygote kills), the amount of output (the reader stops), what `stat` tells of path
names, CPU side channels, kernel bugs.
In the tier `limits` only the rlimits hold: nothing there stops network, files
or processes.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from collections.abc import Mapping
from typing import Any

from prime_lightning.verifiers.jail import kernel, syscalls

_HIGH = 200  # descriptors are parked from here on while 0, 1, 2, ... are laid out
_OPEN_FILES = 64
_HANDLED_BY_PYTHON = (signal.SIGINT, signal.SIGXFSZ, signal.SIGCHLD)  # SIGPIPE stays ignored, as programs expect


def _park(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH)


class Cage:
    """What a zygote prepares so that its children lock themselves in with few system calls.

    Args:
        config: `tier` (`bubblewrap`, `landlock`, `no-open` or `limits`), `uid` to become (or None), `readable` paths,
            `threads` (RLIMIT_NPROC, or 0 for none).

    Raises:
        OSError: The kernel lacks what the tier needs; the zygote ends then.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.tier = config["tier"]
        self._threads = int(config["threads"])
        self._filter: kernel.Filter | None = None
        self._ruleset = -1
        if self.tier not in ("limits", "no-open"):  # before the rights go: what is opened here need not be reachable
            ruleset = kernel.landlock_ruleset(config["readable"])
            self._ruleset = _park(ruleset)
            os.close(ruleset)
        if config["uid"] is not None:
            os.setgroups([])
            os.setresgid(config["uid"], config["uid"], config["uid"])
            os.setresuid(config["uid"], config["uid"], config["uid"])
        if self.tier != "limits":
            self._harden()
        null = os.open(os.devnull, os.O_RDWR)
        self._null = _park(null)
        os.close(null)
        self._zygote = os.getpid()

    def _harden(self) -> None:
        kernel.not_dumpable()
        kernel.no_new_privileges()
        kernel.drop_capabilities()
        self._filter = kernel.Filter(syscalls.build_filter(kernel.MACHINE, files=self.tier != "no-open"))

    def enter(self, descriptors: Mapping[int, int], *, cpu_seconds: int, memory_bytes: int) -> None:
        """Lock this process in, for good. Called once, right after the fork.

        Args:
            descriptors: Number that the process shall see -> descriptor it has now. All others are closed.
            cpu_seconds: SIGXCPU after so much CPU time, SIGKILL a second later; 0 is no limit (a supervisor watches).
            memory_bytes: Limit of the address space.
        """
        os.setsid()
        signal.set_wakeup_fd(-1)
        self._tie_to_zygote()
        for number in _HANDLED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
        ruleset = self._lay_out(descriptors)
        self._limit(cpu_seconds, memory_bytes)
        if ruleset >= 0:
            kernel.landlock_restrict(ruleset)
            os.close(ruleset)
        if self._filter is not None:
            self._filter.install()

    def _tie_to_zygote(self) -> None:
        """End when the zygote ends, which it does with the trainer."""
        if kernel.MACHINE:
            kernel.die_with_parent()
        if os.getppid() != self._zygote:
            os._exit(1)  # it died before we asked

    def leave_open(self, descriptors: Mapping[int, int]) -> None:
        """Lay out the descriptors and take on no limits: for a user's own code that is to run like the trainer's."""
        os.setsid()
        self._tie_to_zygote()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for target, source in {target: _park(source) for target, source in descriptors.items()}.items():
            os.dup2(source, target, inheritable=False)

    def _lay_out(self, descriptors: Mapping[int, int]) -> int:
        """Close all but the named descriptors and the ruleset; returns the ruleset's new number."""
        parked = {target: _park(source) for target, source in descriptors.items()}
        for target in (0, 1, 2):
            parked.setdefault(target, self._null)
        for target, source in parked.items():
            os.dup2(source, target)
        top = max(parked) + 1
        if self._ruleset < 0:
            kernel.close_from(top)
            return -1
        os.dup2(self._ruleset, top)
        kernel.close_from(top + 1)
        return top

    def _limit(self, cpu_seconds: int, memory_bytes: int) -> None:
        limits = {
            resource.RLIMIT_AS: memory_bytes,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_NOFILE: _OPEN_FILES,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
        }
        if cpu_seconds:
            limits[resource.RLIMIT_CPU] = cpu_seconds
        if self._threads:
            limits[resource.RLIMIT_NPROC] = self._threads
        for kind, most in limits.items():
            grace = kind == resource.RLIMIT_CPU  # SIGXCPU says why a process ended; SIGKILL is for one that ignores it
            try:
                resource.setrlimit(kind, (most, most + grace))
            except (ValueError, OSError):
                if self._filter is not None:
                    raise  # macOS refuses some of them; a tier that promises protection must not
