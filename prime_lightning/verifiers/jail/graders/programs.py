"""Grades model-written programs: one process (or two, in `script` mode) per job, forked and locked in.

- `calls`: runs the program, evaluates call expressions, writes one encoded value per line. It never sees what
  is expected.
- `stdio`: runs the program as `__main__` on one standard input.
- `script`: runs the tests in a judge process without model code, and the program in another that answers its calls.

Protects: a program may forge, repeat or leave out any line it likes; lines are only claims about values, compared
outside.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import importlib
import json
import os
import random
import site
import socket
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from prime_lightning.verifiers.jail import candidate, codec, judge, library, wire
from prime_lightning.verifiers.jail.cage import Cage
from prime_lightning.verifiers.jail.zygote import fork

PERSISTENT = False

_COMMON = (  # noqa: SIM905  (a list would be seventy lines)
    "math re collections itertools functools heapq string datetime decimal fractions copy operator statistics "
    "io time struct socket select queue enum dataclasses textwrap cmath numbers abc linecache traceback "
    "calendar hashlib keyword codecs array asyncio pickle difflib pprint secrets zlib base64 unicodedata "
    "locale html uuid fnmatch glob shutil tempfile logging inspect dis bisect typing zoneinfo csv ast unittest "
    "timeit warnings weakref contextvars graphlib ipaddress stringprep encodings.idna encodings.latin_1 "
    "encodings.ascii encodings.utf_16 encodings.utf_8_sig encodings.cp1252 concurrent.futures "
    "concurrent.futures.thread collections.abc importlib.util xml.etree.ElementTree urllib.parse platform hmac "
    "multiprocessing subprocess argparse getopt shlex reprlib types random threading ctypes mmap signal "
    "resource json bz2 lzma "
).split()


def prepare(config: dict[str, Any]) -> None:
    """Import what programs often import, whole packages that were asked for, and `exit`, `quit` and their like."""
    for name in _COMMON:
        with contextlib.suppress(ImportError):  # some builds of Python lack some modules
            importlib.import_module(name)
    for name in config["modules"]:
        library.complete(name)
    site.setquit()  # Python was started without `site`, so that no .pth file is run
    site.setcopyright()
    site.sethelper()


def start(cage: Cage, job: dict[str, Any], descriptors: list[int]) -> list[int]:
    """The children of one job."""
    limits = {"cpu_seconds": job["cpu_seconds"], "memory_bytes": job["memory_bytes"]}
    if job["mode"] == "script":
        return _start_script(cage, limits, descriptors)
    run, layout = (_calls, (4, 3)) if job["mode"] == "calls" else (_stdio, (3, 0, 1))
    child = fork(lambda: _enter(cage, dict(zip(layout, descriptors, strict=True)), limits, run))
    for descriptor in descriptors:
        os.close(descriptor)
    return [child]


def _start_script(cage: Cage, limits: dict[str, int], descriptors: list[int]) -> list[int]:
    """Judge first; its descriptors are closed before the candidate is forked, which so never holds the tests."""
    tests, verdict, source = descriptors
    ours, theirs = (end.detach() for end in socket.socketpair())
    generous = {**limits, "cpu_seconds": limits["cpu_seconds"] + 2}
    children = [fork(lambda: _enter(cage, {3: verdict, 4: ours, 5: tests}, generous, _judge))]
    for descriptor in (tests, verdict, ours):
        os.close(descriptor)
    children.append(fork(lambda: _enter(cage, {3: theirs, 4: source}, limits, _candidate)))
    os.close(source)
    os.close(theirs)
    return children


def _enter(cage: Cage, layout: dict[int, int], limits: dict[str, int], run: Callable[[], None]) -> None:
    cage.enter(layout, **limits)
    gc.enable()
    random.seed(0)  # verdicts must repeat
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    sys.argv = ["solution.py"]
    run()


def _module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module.__dict__


def _calls(leave: Callable[[int], Any] = os._exit) -> None:
    """Descriptors: 4 the job, 3 for results: `["V", i, value]`, `["O", i, type]`, `["E", i, error]`, `["X", error]`."""
    job = json.loads(wire.read_all(4))
    names = _module("solution")
    write = wire.write_line
    try:
        candidate.load(job["source"], names)
        exec(compile(job["setup"], "<setup>", "exec"), names)
    except BaseException as error:
        write(3, ["X", _short(error)])
        leave(0)
    for index, expression in enumerate(job["calls"]):
        try:
            line = ["V", index, codec.encode(eval(compile(expression, "<call>", "eval"), names))]
        except codec.Opaque as error:
            line = ["O", index, str(error)[:80]]
        except BaseException as error:
            line = ["E", index, _short(error)]
        write(3, line)
    leave(0)


def _short(error: BaseException) -> str:
    return type(error).__name__[:80]


def _stdio(leave: Callable[[int], Any] = os._exit) -> None:
    """Descriptors: 0 and 1 are the case's, 3 the source. Ends as `python solution.py` would."""
    source = wire.read_all(3)
    names = _module("__main__")
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape")  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="surrogateescape", newline="\n")  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="replace")  # type: ignore[misc]  # noqa: SIM115
    code = 1
    try:
        exec(compile(source, "solution.py", "exec"), names)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for the program's threads, as at interpreter exit
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BaseException:
        code = code or 1
    leave(code & 255)


def _candidate(leave: Callable[[int], Any] = os._exit) -> None:
    """Descriptors: 4 the program and the names that the tests want, 3 to the judge."""
    job = json.loads(wire.read_all(4))
    candidate.serve(3, job["source"], job["names"], _module("solution"))
    leave(0)


def _judge(leave: Callable[[int], Any] = os._exit) -> None:
    """Descriptors: 5 the tests, 3 for the verdict, 4 to the candidate. No model code is here."""
    job = json.loads(wire.read_all(5))
    wire.write_line(3, judge.judge(4, job))
    leave(0)
