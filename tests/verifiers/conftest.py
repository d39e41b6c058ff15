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
from prime_lightning.verifiers import CodeOptions, Verifiers
from prime_lightning.verifiers.code import answer as code_answer
from prime_lightning.verifiers.workers import persistent
from prime_lightning.verifiers.workers.launch import machine_tiers

TIERS = machine_tiers()
settings.register_profile("verifiers", deadline=None, max_examples=150)
settings.load_profile("verifiers")


@pytest.fixture(scope="session", params=TIERS or ("limits",))
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each tier that this machine has, in turn: whoever starts a grader gets this one and no other."""
    only = tuple(tier for tier in (request.param,) if tier != "limits")
    with pytest.MonkeyPatch.context() as patch:
        for module in (code_answer, persistent):
            patch.setattr(module, "machine_tiers", lambda: only)
        yield request.param


@pytest.fixture(scope="module")
def verifiers(tier: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verifiers]:
    """Graders of all kinds in this tier, for the tests of one file."""
    folder = str(tmp_path_factory.mktemp("calibrations"))
    with Verifiers(workers=2, code=CodeOptions(cpu_seconds=2, wall_seconds=6.0, cache_folder=folder)) as made:
        yield made


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


def _dropped() -> set[str]:
    """Files that the attacks of these tests would leave, by their names."""
    folders = [folder for folder in ("/tmp", "/dev/shm") if os.path.isdir(folder)]
    return {name for folder in folders for name in os.listdir(folder) if name.startswith(("w_sbx", "probe"))}


@pytest.fixture
def leaves_nothing(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test after which there are more processes, descriptors or temporary files than before."""
    if not os.path.isdir("/proc/self/fd"):
        yield
        return
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))  # a folder of our own: other runs have their files too
    processes, descriptors, files = _descendants(), len(os.listdir("/proc/self/fd")), _dropped()
    yield
    for _ in range(100):  # the kernel takes a moment to tear namespaces down
        if _descendants() <= processes and len(os.listdir("/proc/self/fd")) <= descriptors:
            break
        time.sleep(0.05)
    assert _descendants() <= processes, "a process is left"
    assert len(os.listdir("/proc/self/fd")) <= descriptors, "a descriptor is left"
    assert not list(folder.iterdir()), "a temporary file is left"
    assert not _dropped() - files, "a file of an attack is left"
