"""What must hold of the files that run inside: the filter's numbers, and who imports whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prime_lightning.verifiers
from prime_lightning.verifiers.jail import syscalls
from prime_lightning.verifiers.workers import launch

FOLDER = Path(prime_lightning.verifiers.__file__).parent
FLOORS = [
    {
        "jail.syscalls",
        "jail.wire",
        "jail.codec",
        "jail.library",
        "jail.units",
        "code.rows",
        "options",
        "workers.pool",
        "maths.text",
        "maths.units",
        "code.text",
    },
    {
        "jail.kernel",
        "code.matcher",
        "jail.judge",
        "jail.candidate",
        "maths.scalar",
        "maths.final",
        "remote",
    },
    {"jail.cage", "workers.launch", "code.asserts", "maths.shape"},
    {"jail.zygote", "workers.sandbox", "code.units", "maths.compare", "jail.graders.equality"},
    {"code.tests"},
    {"jail.graders.maths", "jail.graders.user", "jail.graders.programs", "workers.persistent", "code.run"},
    {"jail.boot", "maths.answer", "user_answer", "code.selftest", "code.calibration"},
    {"code.answer", "references"},
    {"__init__", *(f"{room}.__init__" for room in ("code", "jail", "jail.graders", "maths", "workers"))},
]
LIBRARY = {"math_verify", "latex2sympy2_extended", "sympy"}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(FOLDER).with_suffix("").parts): path for path in FOLDER.rglob("*.py")}


def test_imports_go_downwards_only() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert set(modules()) == set(floor)
    for name, path in modules().items():
        used = {module.removeprefix("prime_lightning.verifiers.") for module in imports(path)} & floor.keys()
        assert not {other for other in used if floor[other] >= floor[name]}, name


def test_inside_the_jail_there_is_only_the_standard_library() -> None:
    for name, path in modules().items():
        foreign = (
            {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names) - {"prime_lightning"}
        )
        allowed = LIBRARY if name in ("jail.graders.maths", "jail.graders.equality") else set()
        assert foreign <= allowed, name
        if name.startswith("jail."):
            ours = {module for module in imports(path) if module.startswith("prime_lightning")}
            assert all(module.startswith("prime_lightning.verifiers.jail") for module in ours), name


def test_importing_the_verifiers_is_light() -> None:
    heavy = "torch lightning transformers numpy sympy math_verify jsonargparse rich"
    program = f"import sys, prime_lightning.verifiers; print([m for m in {heavy!r}.split() if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    ("header", "column", "pattern"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0, r"#define __NR_(\w+)\s+(\d+)"),
        ("/usr/include/asm-generic/unistd.h", 1, r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
    ],
)
def test_system_call_numbers_are_the_kernels(header: str, column: int, pattern: str) -> None:
    if not Path(header).exists():
        pytest.skip("no kernel headers here")
    kernel = {name: int(number) for name, number in re.findall(pattern, Path(header).read_text())}
    kernel.setdefault("newfstatat", kernel.get("fstatat", -1))
    for name, numbers in (syscalls.ALLOWED | syscalls.READING).items():
        assert numbers[column] is None or kernel[name] == numbers[column], name
    by_hand = {
        "clone": (56, 220), "fcntl": (72, 25), "ioctl": (16, 29), "socketpair": (53, 199), "sendto": (44, 206),
        "prlimit64": (302, 261), "prctl": (157, 167), "clone3": (435, 435), "seccomp": (317, 277), "capset": (126, 91),
    }  # fmt: skip
    assert all(kernel[name] == numbers[column] for name, numbers in by_hand.items())


def evaluate(program: bytes, number: int, arch: int, arguments: tuple[int, ...] = ()) -> int:
    """A classic BPF machine in a few lines: the oracle for the filter."""
    import struct

    data = struct.pack("<iIQ6Q", number, arch, 0, *(*arguments, *(0,) * (6 - len(arguments))))
    code = [struct.unpack("HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
    accumulator, position = 0, 0
    while True:
        operation, yes, no, k = code[position]
        position += 1
        if operation == 0x06:
            return k
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif operation == 0x54:
            accumulator &= k
        else:
            truth = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[operation]
            position += yes if truth else no


def test_gmpy2_is_not_used_where_it_is_installed() -> None:
    assert launch.environment().items() >= {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"}.items()
    assert not set(launch.environment()) & {"HOME", "USER", "PYTHONPATH", "HF_TOKEN", "LD_PRELOAD"}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_on_both_machines(machine: str) -> None:
    column = ("x86_64", "aarch64").index(machine)
    arch = syscalls.AUDIT_ARCH[machine]
    allow, eperm, enosys, kill = 0x7FFF0000, 0x50001, 0x50000 | 38, 0x80000000
    full, closed = (syscalls.build_filter(machine, files=files) for files in (True, False))

    def call(name: tuple[int, int], *arguments: int, program: bytes = full) -> int:
        return evaluate(program, name[column], arch, arguments)

    clone, socketpair, sendto, fcntl, ioctl, prlimit, prctl, openat = (
        (56, 220),
        (53, 199),
        (44, 206),
        (72, 25),
        (16, 29),
        (302, 261),
        (157, 167),
        (257, 56),
    )
    assert call((0, 63)) == allow
    assert call(clone, 0x3D0F00) == allow  # what pthread_create asks for
    assert call(clone, 0x1200011) == eperm  # fork
    assert call(clone, 0x10000 | 0x10000000) == eperm  # a thread in a new user namespace
    assert call((435, 435)) == enosys
    assert call(socketpair, 1, 1) == call(socketpair, 1, 1 | 0o2000000) == allow
    assert call(socketpair, 1, 2) == call(socketpair, 2, 1) == call(socketpair, 1, 5) == eperm
    assert call(sendto, 3, 4, 5, 0, 0, 0) == allow
    assert call(sendto, 3, 4, 5, 0, 1, 16) == call(sendto, 3, 4, 5, 0, 1 << 32, 16) == eperm
    assert call(fcntl, 0, 1030) == allow
    assert call(fcntl, 0, 8) == call(fcntl, 0, 10) == call(fcntl, 0, 15) == call(fcntl, 0, 1024) == eperm
    assert call(ioctl, 0, 0x5401) == allow
    assert call(ioctl, 0, 0x5412) == 0x50000 | 25
    assert call(prlimit, 0) == allow
    assert call(prlimit, 7) == eperm
    assert call(prctl, 15) == allow
    assert call(prctl, 1) == eperm
    assert call(openat) == allow
    assert call(openat, program=closed) == eperm
    for name in (
        (57, 57),
        (59, 221),
        (41, 198),
        (49, 200),
        (62, 129),
        (101, 117),
        (319, 279),
        (425, 425),
        (424, 424),
        (82, 276),
    ):
        if name != (57, 57) or column == 0:
            assert call(name) == eperm, name
    assert call((500, 500)) == enosys
    assert evaluate(full, 0, 0x40000003) == kill
    if column == 0:
        assert evaluate(full, 0x40000000, arch) == kill
