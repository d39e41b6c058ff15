"""System calls that Python lacks: no_new_privs, seccomp, Landlock, capset, close_range.

Protects nothing by itself: `cage.py` says in which order these are used. Linux on x86_64 and aarch64; elsewhere
`machine` is empty, and the functions are not called.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable

from prime_lightning.verifiers.jail import syscalls

MACHINE = platform.machine() if sys.platform == "linux" and platform.machine() in syscalls.SECCOMP else ""
"""`x86_64` or `aarch64` on Linux, else empty: no seccomp, no Landlock."""

_libc = ctypes.CDLL(None, use_errno=True)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CAPSET = {"x86_64": 126, "aarch64": 91}
_READ_FILE, _READ_DIR, _WRITE_FILE = 4, 8, 2
_OF_FILES = 1 | 2 | 4 | 1 << 14 | 1 << 15  # the rights that a rule on a plain file may name
# Landlock's handled rights by ABI: 1 has 13 of them, 2 adds refer, 3 truncate, 5 ioctl on devices
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"  # Python 3.14 wants it said when `_pack_` is set
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int) -> None:
    """`prctl(2)` with one argument."""
    _check(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def no_new_privileges() -> None:
    """No set-user-id program can give this process more rights; seccomp asks for it."""
    prctl(38, 1)


def not_dumpable() -> None:
    """Processes of the same user cannot trace this one or read its memory. Undone by exec and by a change of user."""
    prctl(4, 0)


def die_with_parent() -> None:
    """SIGKILL when the thread that made this process ends."""
    prctl(1, 9)


def drop_capabilities() -> None:
    """Effective, permitted and inheritable sets become empty."""
    header, sets = struct.pack("II", 0x20080522, 0), bytes(24)
    _check(_libc.syscall(_CAPSET[MACHINE], ctypes.c_char_p(header), ctypes.c_char_p(sets)), "capset")


class Filter:
    r"""A seccomp program in memory, ready to install; made once, before a fork.

    Example:
        >>> Filter(b"\x06\x00\x00\x00\x00\x00\xff\x7f").length  # one instruction: allow
        1
    """

    def __init__(self, instructions: bytes) -> None:
        self.length = len(instructions) // 8
        self._memory = ctypes.create_string_buffer(instructions, len(instructions))
        self._program = _Program(self.length, ctypes.addressof(self._memory))

    def install(self) -> None:
        """Filter this thread and those it starts, for good."""
        _check(_libc.syscall(syscalls.SECCOMP[MACHINE], 1, 0, ctypes.byref(self._program)), "seccomp")


def landlock_abi() -> int:
    """Version of Landlock that the kernel has; 0 is none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, 0, 1))) if MACHINE else 0


def landlock_ruleset(readable: Iterable[str]) -> int:
    """A ruleset: read below `readable`, write to /dev/null, nothing else; no TCP, signals only within the domain.

    Returns:
        Its descriptor, for `landlock_restrict`.

    Raises:
        OSError: The kernel refused.
    """
    abi = landlock_abi()
    rights = _RIGHTS.get(abi, (1 << 16) - 1)
    ruleset = _Ruleset(rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    descriptor = _check(_libc.syscall(_CREATE_RULESET, ctypes.byref(ruleset), size, 0), "landlock_create_ruleset")
    rules = [(path, _READ_FILE | _READ_DIR) for path in readable]
    for path, allowed in [*rules, ("/dev/urandom", _READ_FILE), ("/dev/null", _READ_FILE | _WRITE_FILE)]:
        try:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # a path that is not there needs no right
        rule = _PathRule(allowed if os.path.isdir(path) else allowed & _OF_FILES, parent)
        _check(_libc.syscall(_ADD_RULE, descriptor, 1, ctypes.byref(rule), 0), f"landlock_add_rule {path}")
        os.close(parent)
    return descriptor


def landlock_restrict(descriptor: int) -> None:
    """Enter the ruleset, for good. Needs no_new_privs."""
    _check(_libc.syscall(_RESTRICT_SELF, descriptor, 0), "landlock_restrict_self")


def close_from(lowest: int) -> None:
    """Close every descriptor from `lowest` on."""
    if not MACHINE or _libc.syscall(436, lowest, 0xFFFFFFFF, 0):
        os.closerange(lowest, 4096)
