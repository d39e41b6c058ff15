"""Shared by the tests of the verifiers: prompts, the data folder, and a census of what must not be left behind."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from prime_lightning.rollout import Prompt
from prime_lightning.verifiers.launch import machine_tiers

TIERS = machine_tiers()
settings.register_profile("verifiers", deadline=None, max_examples=150)
settings.load_profile("verifiers")


def prompt(kind: str, answer: str = "", row: dict[str, Any] | None = None, source: str = "test") -> Prompt:
    return Prompt(draw=0, token_ids=(), text="question", kind=kind, answer=answer, row=row or {}, source=source)


def data_folder() -> Path | None:
    given = os.environ.get("PRIME_TEST_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def rows() -> Callable[[str], list[dict[str, Any]]]:
    """Reads a file of the data folder; skips where there is no such folder."""
    folder = data_folder()
    if folder is None:
        pytest.skip("no data folder: set PRIME_TEST_DATA")

    def read(name: str) -> list[dict[str, Any]]:
        path = folder / name
        with gzip.open(path, "rt") if name.endswith(".gz") else path.open() as lines:
            return [json.loads(line) for line in lines]

    return read


def _descendants() -> set[int]:
    """Processes below this one, zombies too."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = {os.getpid()}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found - {os.getpid()}
        found |= more


def _census() -> tuple[set[int], int, set[str]]:
    temporary = {
        name for folder in (tempfile.gettempdir(), "/dev/shm") if os.path.isdir(folder) for name in os.listdir(folder)
    }
    return (
        _descendants(),
        len(os.listdir("/proc/self/fd")),
        {name for name in temporary if not name.startswith("pytest")},
    )


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Fails a test after which there are more processes, descriptors or temporary files than before."""
    if not os.path.isdir("/proc/self/fd"):
        yield
        return
    processes, descriptors, files = _census()
    yield
    for _ in range(100):  # the kernel takes a moment to tear namespaces down
        now = _census()
        if now[0] <= processes and now[1] <= descriptors:
            break
        time.sleep(0.05)
    assert now[0] <= processes, "a process is left"
    assert now[1] <= descriptors, "a descriptor is left"
    assert not {name for name in now[2] - files if name.startswith(("prime-probe", "w_sbx", "probe"))}, "a file is left"
