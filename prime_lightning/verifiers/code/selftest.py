"""Does the sandbox hold, and does an honest program run in it: tried in a tier before anything else is run there.

Each probe returns True only if it succeeds in what must not be possible. A tier with one such probe is not used, nor is
one in which a module of the standard library cannot be imported: a program that asks for it would be called wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from prime_lightning.verifiers.code.asserts import Call
from prime_lightning.verifiers.code.run import Plan, Runner
from prime_lightning.verifiers.code.tests import Task
from prime_lightning.verifiers.jail import library

PROBES = {
    "reads a file of the user": "def probe(): return 'CANARY' in open(PATH).read()",
    "lists the user's files": "import os\ndef probe(): return 'canary' in os.listdir(os.path.dirname(PATH))",
    "writes a file": (
        "import os\ndef probe():\n    os.write(os.open(PATH, os.O_WRONLY | os.O_APPEND), b'x'); return True"
    ),
    "creates a file": (
        "import os\ndef probe():\n    os.close(os.open('/tmp/probe', os.O_CREAT | os.O_WRONLY)); return True"
    ),
    "removes a file": "import os\ndef probe():\n    os.unlink(PATH); return True",
    "changes a file's mode": "import os\ndef probe():\n    os.chmod(PATH, 0o777); return True",
    "reads a process": "import os\ndef probe(): return len(open(f'/proc/{os.getppid()}/environ', 'rb').read()) > 0",
    "sees the environment": "import os\ndef probe(): return any('CANARY' in k + v for k, v in os.environ.items())",
    "opens a TCP socket": "import socket\ndef probe():\n    socket.socket().close(); return True",
    "opens a UDP socket": (
        "import socket\ndef probe():\n    socket.socket(type=socket.SOCK_DGRAM).close(); return True"
    ),
    "opens a Unix socket": "import socket\ndef probe():\n    socket.socket(socket.AF_UNIX).close(); return True",
    "sends a datagram": (
        "import socket\ndef probe():\n    socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].close(); return True"
    ),
    "forks": "import os\ndef probe():\n    if os.fork() == 0: os._exit(0)\n    return True",
    "forks by libc": (
        "import ctypes, os\n"
        "def probe():\n    p = ctypes.CDLL(None).fork()\n    if p == 0: os._exit(0)\n    return p > 0"
    ),
    "runs a program": "import subprocess\ndef probe(): return subprocess.run(['/bin/true']).returncode == 0",
    "signals its parent": "import os\ndef probe():\n    os.kill(os.getppid(), 0); return True",
    "signals by fcntl": (
        "import fcntl, os\n"
        "def probe():\n    r, w = os.pipe(); fcntl.fcntl(r, 8, os.getppid())\n    return fcntl.fcntl(r, 9) > 0"
    ),
    "traces its parent": (
        "import ctypes, os\ndef probe(): return ctypes.CDLL(None).ptrace(0x4206, os.getppid(), 0, 0) == 0"
    ),
    "raises its limits": (
        "import resource as r\ndef probe():\n    r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2); return True"
    ),
    "sees a descriptor above its own": (
        "import os\n"
        "def probe():\n"
        "    for n in range(4, 1024):\n"
        "        try: os.fstat(n)\n"
        "        except OSError: continue\n"
        "        return True"
    ),
    "makes a memory file": "import os\ndef probe(): return os.memfd_create('x') >= 0",
    "is root": "import os\ndef probe(): return os.geteuid() == 0",
    "takes 3 GiB": "def probe():\n    x = [bytearray(1 << 28) for _ in range(12)]; return True",
}
"""What it does if it leaks -> program; `PATH` is a file of the user outside the jail."""


def leaks(runner: Runner) -> list[str]:
    """The probes that got out.

    Raises:
        WorkerDied: The jail failed.
    """
    with tempfile.TemporaryDirectory(prefix="prime-probe-") as folder:
        canary = Path(folder) / "canary"
        canary.write_text("CANARY")
        os.chmod(folder, 0o755)  # readable for all: only the walls are tested, not the file's mode
        canary.chmod(0o666)
        task = Task(tests=("assert probe() == True",), calls=(Call("probe()", True),))
        plan = Plan(mode="calls", cpu_seconds=2)
        return [
            name
            for name, probe in PROBES.items()
            if runner.run(task, plan, f"PATH = {str(canary)!r}\n{probe}\n").share > 0
        ]


_IMPORT_SECONDS = 60
_IMPORTS = """
import importlib
for name in NAMES:
    print("?", name, flush=True)
    try:
        importlib.import_module(name)
    except BaseException as error:
        print("!", name, type(error).__name__, " ".join(str(error).split()), sep="\\t", flush=True)
print(".")
"""


def faults(runner: Runner, modules: Iterable[str] = ()) -> list[str]:
    """What an honest program cannot do: a jail in which nothing runs would leak nothing either.

    Args:
        runner: The jail.
        modules: Third-party modules that programs may import.

    Raises:
        WorkerDied: The jail failed.
    """
    return _calls_that_fail(runner) or _imports_that_fail(runner, modules)


def _calls_that_fail(runner: Runner) -> list[str]:
    program = "import math, re\ndef f(n): return int(math.pow(n, 2))\n"
    asserts = Task(tests=("assert f(2) == 4",), calls=(Call("f(2)", 4),), names=("f",))
    tried = {
        "calls": (asserts, program),
        "script": (asserts, program),
        "stdio": (Task(stdio=(("2\n", "4\n"),)), "print(int(input()) ** 2)\nexit()\n"),
    }
    failed = []
    for mode, (task, source) in tried.items():
        outcome = runner.run(task, Plan(mode=mode, cpu_seconds=_IMPORT_SECONDS), source)
        if outcome.share != 1.0:
            failed.append(f"run in the mode {mode} ({outcome.fault or outcome.reason})")
    return failed


def _imports_that_fail(runner: Runner, modules: Iterable[str]) -> list[str]:
    source = f"NAMES = {[*library.names(), *modules]!r}\n{_IMPORTS}"
    report = runner.printed(source, cpu_seconds=_IMPORT_SECONDS)
    lines = report.output.decode(errors="replace").splitlines()
    entries = [line.split("\t") for line in lines if line.startswith("!\t")]
    outside = _importable_outside([entry[1] for entry in entries])
    failed = [f"import {name} ({kind}: {message})" for _, name, kind, message in entries if name in outside]
    if not report.clean or lines[-1:] != ["."]:
        last = next((line[2:] for line in reversed(lines) if line.startswith("? ")), "anything")
        failed.append(f"import {last} ({report.stopped or 'it ends the process'})")
    return failed


def _importable_outside(names: list[str]) -> set[str]:
    """Those of the modules that this machine has: not those of other systems, or in a package not installed."""
    source = f"NAMES = {names!r}\n{_IMPORTS}"
    command = [os.path.realpath(sys.executable), "-s", "-P", "-S", "-W", "ignore", "-c", source]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return set(names) - {line.split("\t")[1] for line in done.stdout.splitlines() if line.startswith("!\t")}
