"""The syscall allow-list of a jailed process, as a classic BPF program for x86_64 and aarch64.

Protects: no process can be made (fork, exec), no socket opened, no other process signalled or read, no file changed;
with `files=False` none opened either. Everything unlisted fails with EPERM, numbers newer than the table with ENOSYS
(libc then falls back), a foreign ABI (i386 `int 0x80`, x32) kills.
Leaves out: which files may be read (Landlock's
work, `kernel.py`), memory and time (rlimits). `stat` is allowed, so whether a path exists can be seen. Kernel bugs
behind the allowed calls are not covered.
"""

from __future__ import annotations

import errno
import struct

Pair = tuple[int | None, int | None]
ALLOWED: dict[str, Pair] = {
    # hot
    "read": (0, 63),
    "write": (1, 64),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "brk": (12, 214),
    "futex": (202, 98),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "clock_gettime": (228, 113),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getrandom": (318, 278),
    # memory, threads
    "mremap": (25, 216),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "getcpu": (309, 168),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "arch_prctl": (158, None),
    # own descriptors
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "preadv": (295, 69),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create": (213, None),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "fadvise64": (221, 223),
    "close_range": (436, 436),
    # time and signals to itself
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "alarm": (37, None),
    "pause": (34, None),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    # who am I
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getcwd": (79, 17),
    "umask": (95, 166),
    "getrlimit": (97, 163),
    "setrlimit": (160, 164),
    "getrusage": (98, 165),
    # names of files (contents need an `open` below)
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fstatfs": (138, 44),
}
"""Name -> number on (x86_64, aarch64); None where the architecture lacks it."""

READING: dict[str, Pair] = {
    "open": (2, None),
    "openat": (257, 56),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents": (78, None),
    "getdents64": (217, 61),
}
"""Allowed only where Landlock decides which files may be opened."""

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP = {"x86_64": 317, "aarch64": 277}
"""Number of `seccomp(2)` itself."""

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # classic BPF opcodes
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data
_NEWEST = 450  # unlisted numbers from here on answer ENOSYS

_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020080
_FCNTL = (
    0,
    1,
    2,
    3,
    4,
    5,
    1030,
    1032,
)  # DUPFD, {GET,SET}FD, {GET,SET}FL, GETLK, DUPFD_CLOEXEC, GETPIPE_SZ: no F_SETOWN (signals!)
_IOCTL = (
    0x5401,
    0x541B,
    0x5451,
    0x5450,
    0x5421,
)  # TCGETS, FIONREAD, FIOCLEX, FIONCLEX, FIONBIO: no FIOSETOWN, no TIOCSTI
_AF_UNIX, _SOCK_STREAM = 1, 1
_PR_SET_NAME = 15


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, jump_true, jump_false, k)


def _error(number: int) -> bytes:
    return _op(_RETURN, 0x00050000 | number)


def _low(argument: int) -> bytes:
    """Load the low 32 bits of a syscall argument (both machines are little endian)."""
    return _op(_LOAD, 16 + 8 * argument)


def _when(number: int, body: bytes) -> bytes:
    """Run `body`, which must return, if the syscall is `number`."""
    return _op(_EQUAL, number, 0, len(body) // 8) + body


def _one_of(argument: int, values: tuple[int, ...], refused: int) -> bytes:
    """Allow the call if its argument is one of `values`."""
    tests = b"".join(_op(_EQUAL, value, 0, 1) + _op(_RETURN, _ALLOW) for value in values)
    return _low(argument) + tests + _error(refused)


def _conditional(machine: str) -> bytes:
    """The calls that are allowed with some arguments only."""
    x86 = machine == "x86_64"
    allow, refuse = _op(_RETURN, _ALLOW), _error(errno.EPERM)
    thread_only = _low(0) + _op(_ANY_BIT, _CLONE_THREAD, 0, 2) + _op(_ANY_BIT, _CLONE_NEW, 1, 0) + allow + refuse
    # A datagram could be sent to any socket of the machine by its address: stream pairs only, and never an address.
    stream_pair = (
        _low(0)
        + _op(_EQUAL, _AF_UNIX, 1, 0)
        + refuse
        + _low(1)
        + _op(0x54, 0xF)
        + _op(_EQUAL, _SOCK_STREAM, 0, 1)
        + allow
    ) + refuse
    no_address = (
        _low(4) + _op(_EQUAL, 0, 1, 0) + refuse + _op(_LOAD, 16 + 8 * 4 + 4) + _op(_EQUAL, 0, 0, 1) + allow + refuse
    )
    return b"".join(
        [
            _when(56 if x86 else 220, thread_only),
            _when(
                435, _error(errno.ENOSYS)
            ),  # clone3: its flags are in memory, where a filter cannot look; libc falls back
            _when(72 if x86 else 25, _one_of(1, _FCNTL, errno.EPERM)),
            _when(16 if x86 else 29, _one_of(1, _IOCTL, errno.ENOTTY)),
            _when(53 if x86 else 199, stream_pair),
            _when(44 if x86 else 206, no_address),
            _when(302 if x86 else 261, _one_of(0, (0,), errno.EPERM)),  # prlimit64 of itself
            _when(157 if x86 else 167, _one_of(0, (_PR_SET_NAME,), errno.EPERM)),
        ]
    )


def build_filter(machine: str, *, files: bool) -> bytes:
    """The BPF program for one machine.

    Args:
        machine: `x86_64` or `aarch64`, as `platform.machine()` says.
        files: Whether files may be opened at all; Landlock must then say which.

    Returns:
        The instructions, 8 bytes each.

    Example:
        >>> len(build_filter("x86_64", files=True)) > len(build_filter("x86_64", files=False)) > 100
        True
    """
    column = ("x86_64", "aarch64").index(machine)
    listed = ALLOWED | READING if files else ALLOWED
    numbers = [pair[column] for pair in listed.values()]
    parts = [_op(_LOAD, _ARCH), _op(_EQUAL, AUDIT_ARCH[machine], 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    if machine == "x86_64":
        parts += [_op(_ANY_BIT, 0x40000000, 0, 1), _op(_RETURN, _KILL)]  # x32
    parts += [_op(_EQUAL, number, 0, 1) + _op(_RETURN, _ALLOW) for number in numbers if number is not None]
    parts.append(_conditional(machine))
    parts += [_op(0x35, _NEWEST, 0, 1), _error(errno.ENOSYS), _error(errno.EPERM)]  # 0x35: jump if >=
    return b"".join(parts)
