"""Peak memory of a process; nothing is imported, so that every environment can."""

from __future__ import annotations

from pathlib import Path


def peak_gib(status: str = "/proc/self/status") -> float:
    """The most physical memory that this program has had, of Linux (`VmHWM`), GiB.

    `ru_maxrss` of `getrusage` is no such number: a program that another one starts keeps what that had at the time.
    """
    lines = dict(line.split(":", 1) for line in Path(status).read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) / 2**20
