"""How a zygote is started: the tiers of walls, what each shows of the machine, and the command line that builds it.

Tiers, best first; `code/answer.py` takes the best one whose self-test leaks nothing:
- `bubblewrap`: own mount, process, network, IPC and host-name namespaces for each zygote, and all of the next tier
  inside;
- `landlock`: seccomp allow-list, Landlock, rlimits, no capabilities, and for root a user of its own;
- `no-open`: as before without Landlock, so no file can be opened at all: modules come from memory (`jail/library.py`);
- `limits`: rlimits only (macOS, old kernels). Network, files and processes are NOT protected; a user must ask for it.

Leaves out: cgroups (memory is limited per process by its address space), macOS's sandbox-exec (deprecated, and not
tested here).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_lightning.verifiers.jail import kernel
from prime_lightning.verifiers.workers.pool import WorkerDied

TIERS = ("bubblewrap", "landlock", "no-open")
"""The tiers that protect, best first."""

_FIRST_UID, _UIDS = 61_000, 4_000
_THREADS = 256
_user_numbers = itertools.count(os.getpid() * 61)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZygoteSpec:
    """What a zygote is for.

    Example:
        >>> ZygoteSpec(module="programs").path
        ()
    """

    module: str
    """File of `jail/` that does the work: `programs`, `maths` or `user`."""
    modules: tuple[str, ...] = ()
    """Imported before the doors close, so that children have them for nothing."""
    path: tuple[str, ...] = ()
    """Folders added to `sys.path` there; readable in the jail."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Further entries of the zygote's configuration."""
    whole_package: bool = False
    """Whether all of prime_lightning can be imported there, not `jail` alone."""
    inherits: bool = False
    """Whether it has the trainer's environment, site packages and working directory (only for a user's own code)."""


def libraries(names: tuple[str, ...]) -> tuple[str, ...]:
    """The folders that importable packages lie in.

    Raises:
        ModuleNotFoundError: One of them is not installed.
    """
    folders = []
    for name in names:
        spec = importlib.util.find_spec(name.partition(".")[0])
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"Expected the package `{name}` to be installed for the verifiers.", name=name)
        origin = Path(spec.origin)
        folders.append(str(origin.parent.parent if origin.name == "__init__.py" else origin.parent))
    return tuple(dict.fromkeys(folders))


def environment() -> dict[str, str]:
    """All that a jailed process sees of the environment: nothing of the trainer's.

    Example:
        >>> "HOME" in environment()
        False
    """
    shared = sysconfig.get_config_var("Py_ENABLE_SHARED")  # found by the trainer's own LD_LIBRARY_PATH, perhaps
    return {
        **({"LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"} if shared else {}),
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # the order of sets, and so verdicts, repeats
        "PYTHONDONTWRITEBYTECODE": "1",
        "SYMPY_GROUND_TYPES": "python",  # gmpy2's long operations cannot be interrupted ...
        "MPMATH_NOGMPY": "1",  # ... and take memory beyond the interpreter's own checks
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _readable(spec: ZygoteSpec) -> list[str]:
    libraries = [sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["platstdlib"], f"{sys.base_prefix}/lib"]
    return [
        *libraries,
        "/usr/lib",
        "/usr/lib64",
        "/lib",
        "/lib64",
        "/usr/share/zoneinfo",
        "/etc/localtime",
        *spec.path,
    ]


def _user_threads() -> int:
    """Threads that this user has now, on the whole machine."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == os.getuid():
                count += len(list((process / "task").iterdir()))
    return count


def command_line(tier: str, spec: ZygoteSpec, control: int) -> list[str]:
    """The command that starts a zygote with `control` as its channel.

    Raises:
        WorkerDied: The tier's program is not installed.
    """
    protected = tier != "limits"
    root = os.getuid() == 0 and protected
    config = {
        **dict(spec.settings),
        "tier": tier,
        "grader": spec.module,
        "modules": spec.modules,
        "path": spec.path,
        "whole_package": spec.whole_package,
        "control": control,
        "uid": _FIRST_UID + next(_user_numbers) % _UIDS if root else None,
        "readable": _readable(spec),
        # RLIMIT_NPROC counts all threads of a user: a user of its own gets few, else room above what runs now
        "threads": 0 if not protected else _THREADS if root else _user_threads() + 16 * _THREADS,
    }
    boot = Path(__file__).parent.parent / "jail" / "boot.py"
    if spec.inherits:
        return [sys.executable, "-P", str(boot), json.dumps(config)]
    # -S: no .pth file is run; the real executable: a virtual environment's folder need not be seen inside.
    python = [os.path.realpath(sys.executable), "-s", "-P", "-S", str(boot), json.dumps(config)]
    if tier != "bubblewrap":
        return python
    return [*_bubblewrap([str(boot.parent), *spec.path]), "--", *python]


def _bubblewrap(readable: Iterable[str]) -> list[str]:
    """The command that gives the rest of the line a world of its own, without /proc, network or writable files."""
    found = shutil.which("bwrap")
    if found is None:
        raise WorkerDied("bubblewrap (the program `bwrap`) is not installed")
    command = [found, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/sbin", "/lib", "/lib64"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    command += ["--dev", "/dev", "--size", str(16 << 20), "--tmpfs", "/tmp", "--remount-ro", "/dev"]
    for path in dict.fromkeys([os.path.realpath(sys.base_prefix), *readable, "/etc/localtime"]):
        if not path.startswith(("/usr/", "/lib")) and path != "/usr" and os.path.exists(path):
            command += [*_parents(path), "--ro-bind", path, path]
    command += ["--remount-ro", "/", "--chdir", "/tmp"]
    if os.getuid() != 0:
        return [*command, "--unshare-user"]
    # Root stays root of the machine's user namespace, so its capabilities must go; three serve to become another user.
    kept = itertools.chain.from_iterable(("--cap-add", name) for name in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"))
    return [*command, "--cap-drop", "ALL", *kept]


def _parents(path: str) -> list[str]:
    """Bubblewrap makes the parents of a mount for their owner only; another user must be able to pass."""
    return list(
        itertools.chain.from_iterable(("--perms", "0755", "--dir", str(p)) for p in [*Path(path).parents][-2::-1])
    )


def machine_tiers() -> tuple[str, ...]:
    """The protecting tiers whose parts this machine has; whether they hold is for the self-test to say.

    Example:
        >>> set(machine_tiers()) <= set(TIERS)
        True
    """
    if not kernel.MACHINE:
        return ()
    landlock = kernel.landlock_abi() > 0
    have = {"bubblewrap": landlock and shutil.which("bwrap") is not None, "landlock": landlock, "no-open": True}
    return tuple(tier for tier in TIERS if have[tier])
