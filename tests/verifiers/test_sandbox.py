"""Containment, hacks and hogs on every tier that this machine can run."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prime_lightning
from prime_lightning.rollout import Label, Verdict
from prime_lightning.verifiers import CodeOptions, SandboxLeaks, Verifiers
from prime_lightning.verifiers.code import answer as code_answer
from prime_lightning.verifiers.code import selftest
from prime_lightning.verifiers.code.run import Runner
from prime_lightning.verifiers.jail import library
from prime_lightning.verifiers.workers.launch import ZygoteSpec, machine_tiers
from prime_lightning.verifiers.workers.pool import WorkerDied
from prime_lightning.verifiers.workers.sandbox import Zygote, memory_file

from .attacks import ESCAPES, HACKS, HOGS, HONEST, Attack
from .conftest import TIERS, prompt

pytestmark = pytest.mark.skipif(
    not TIERS, reason="this system has no sandbox: programs are refused, which test_front checks"
)

CANARY = Path("/tmp/prime_canary")


def options(tier: str, folder: Path) -> CodeOptions:
    return CodeOptions(tier=tier, cpu_seconds=2, wall_seconds=6.0, cache_folder=str(folder))


def task_row(tests: list[Any]) -> dict[str, Any]:
    if isinstance(tests[0], str):
        return {"tests": tests}
    return {"tests": [{"stdin": stdin, "stdout": stdout} for stdin, stdout in tests]}


def misjudged(verifiers: Verifiers, attacks: list[Attack]) -> list[tuple[str, Verdict]]:
    verdicts = verifiers.map((prompt("code", row=task_row(tests)), program) for _, tests, program, _ in attacks)
    pairs = zip(attacks, verdicts, strict=True)
    return [
        (attack[0], verdict) for attack, verdict in pairs if not verdict.known or (verdict.score == 1.0) != attack[3]
    ]


def test_the_self_test_finds_no_leak(tier: str) -> None:
    runner = Runner(tier, CodeOptions(), ZygoteSpec(module="programs"))
    try:
        assert selftest.leaks(runner) == []
        assert selftest.faults(runner) == []
    finally:
        runner.close()


def test_the_probes_find_leaks_where_there_are_some() -> None:
    runner = Runner("limits", CodeOptions(), ZygoteSpec(module="programs"))
    try:
        assert {"reads a file of the user", "opens a TCP socket", "forks", "runs a program"} <= set(
            selftest.leaks(runner)
        )
    finally:
        runner.close()


def honest(tier: str) -> list[Attack]:
    """In the tier `no-open` not even /dev/null can be opened."""
    return [attack for attack in HONEST if tier != "no-open" or attack[0] != "stdio devnull"]


def test_own_attacks(tier: str, tmp_path: Path, leaves_nothing: None) -> None:
    with Verifiers(workers=2, code=options(tier, tmp_path)) as verifiers:
        assert misjudged(verifiers, [*honest(tier), *HACKS, *ESCAPES]) == []


@pytest.mark.timeout(300)
def test_own_hogs(tier: str, tmp_path: Path, leaves_nothing: None) -> None:
    with Verifiers(workers=2, code=options(tier, tmp_path)) as verifiers:
        assert misjudged(verifiers, HOGS) == []
        assert misjudged(verifiers, honest(tier)) == []


@pytest.fixture
def canary() -> None:
    CANARY.mkdir(exist_ok=True)
    for name, mode in (("secret.txt", 0o644), ("secret600.txt", 0o600)):
        (CANARY / name).write_text("CANARY")
        (CANARY / name).chmod(mode)


def _attacks_file(rows: Callable[[str], list[dict[str, Any]]]) -> list[Attack]:
    return [
        (
            row["name"],
            [test if isinstance(test, str) else (test["stdin"], test["stdout"]) for test in row["tests"]],
            row["program"],
            row["expected"] == "pass",
        )
        for row in rows("sandbox_attacks.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_attacks_file(tier: str, tmp_path: Path, rows, canary: None, leaves_nothing: None, monkeypatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", "CANARY")
    with Verifiers(workers=2, code=options(tier, tmp_path)) as verifiers:
        assert misjudged(verifiers, _attacks_file(rows)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shuffled_stress(tier: str, tmp_path: Path, rows, canary: None, leaves_nothing: None) -> None:
    """600 jobs, hostile and honest mixed: the neighbour of an attack is judged as if it were alone."""
    # 123 takes five seconds; 126 is called `sum`, and only its reference, left out here, tells that from the builtin
    quick = [row for row in rows("mbpp.jsonl") if row["id"] not in ("mbpp/123", "mbpp/126")]
    honest = [(row["id"], row["tests"], f"{row['reference_solution']}\n{row['setup']}", True) for row in quick[:490]]
    jobs = [*_attacks_file(rows), *honest]
    random.Random(0).shuffle(jobs)
    assert len(jobs) == 600
    with Verifiers(workers=2, code=options("auto", tmp_path)) as verifiers:
        assert misjudged(verifiers, jobs) == []


PLAIN_USER = """
import sys
from prime_lightning.verifiers import CodeOptions
from prime_lightning.verifiers.code import selftest
from prime_lightning.verifiers.code.run import Runner
from prime_lightning.verifiers.workers.pool import WorkerDied
from prime_lightning.verifiers.workers.launch import ZygoteSpec, machine_tiers
for tier in machine_tiers():
    try:
        runner = Runner(tier, CodeOptions(), ZygoteSpec(module="programs"))
    except WorkerDied as error:
        print(tier, "does not start", error)
        continue
    print(tier, selftest.leaks(runner), selftest.faults(runner))
    runner.close()
"""


def _system_python() -> str | None:
    """A Python that every user may run; the one of the tests may lie in a home folder."""
    python = "/usr/bin/python3"
    if not os.path.exists(python) or os.getuid() != 0:
        return None
    new_enough = subprocess.run(
        [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False
    ).returncode
    return None if new_enough else python


@pytest.mark.skipif(
    _system_python() is None, reason="needs root, to become another user, and a system Python of at least 3.11"
)
def test_a_plain_user_has_the_same_walls(leaves_nothing: None) -> None:
    """Root's jails are another user's, a plain user's are his own: the walls must not rest on that."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # every user may pass there
        os.chmod(folder, 0o755)
        package = Path(prime_lightning.__file__).parent
        for name in ("verifiers", "rollout"):
            shutil.copytree(package / name, f"{folder}/prime_lightning/{name}")
        shutil.copy(package / "__init__.py", f"{folder}/prime_lightning")
        command = [str(_system_python()), "-B", "-c", PLAIN_USER]
        done = subprocess.run(
            command, cwd=folder, user=65534, group=65534, env={"PATH": "/usr/bin"}, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.endswith("[] []") or "does not start" in line for line in lines), lines
    assert any(line.startswith(("landlock", "no-open")) and line.endswith("[] []") for line in lines), lines


EVERY_TIER = """
import os
from prime_lightning.verifiers import CodeOptions
from prime_lightning.verifiers.code import selftest
from prime_lightning.verifiers.code.run import Runner
from prime_lightning.verifiers.workers.launch import ZygoteSpec, machine_tiers
for tier in machine_tiers():
    runner = Runner(tier, CodeOptions(), ZygoteSpec(module="programs"))
    print(os.__file__, tier, selftest.leaks(runner), selftest.faults(runner))
    runner.close()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: only root's jails belong to another user")
@pytest.mark.parametrize("closed", ["above", "all"])
def test_the_library_is_complete_below_a_folder_that_is_closed_to_others(closed: str, tmp_path: Path) -> None:
    """As below a home folder of mode 700, or installed with a umask of 077."""
    prefix, version = Path(sys.base_prefix), f"python{sys.version_info[0]}.{sys.version_info[1]}"
    copied = tmp_path / "home" / "python"
    ignored = shutil.ignore_patterns("site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__")
    shutil.copytree(Path(os.__file__).parent, copied / "lib" / version, ignore=ignored)
    (copied / "bin").mkdir()
    shutil.copy(os.path.realpath(sys.executable), copied / "bin" / version)
    for shared in (prefix / "lib").glob(f"lib{version}*.so*"):
        shutil.copy(shared, copied / "lib")
    for path in copied.rglob("*") if closed == "all" else ():
        path.chmod(path.stat().st_mode & 0o700)
    (tmp_path / "home").chmod(0o700)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(prime_lightning.__file__).parents[1]),
        "LD_LIBRARY_PATH": f"{copied}/lib",
    }
    command = [str(copied / "bin" / version), "-B", "-s", "-c", EVERY_TIER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{copied}/lib/{version}/os.py {tier} [] []" for tier in TIERS]


OPEN = """
import os
seen = []
for number in range({first}, 1024):
    try:
        os.fstat(number)
    except OSError:
        continue
    seen.append(number)
def descriptors(): return seen
"""


def test_a_program_sees_no_descriptors_but_its_own(tier: str, tmp_path: Path) -> None:
    """Standard input, output and error, and for calls and asserts the pipe or socket that carries the answers."""
    with Verifiers(workers=1, code=options(tier, tmp_path)) as verifiers:
        calls = {"tests": ["assert descriptors() == [0, 1, 2, 3]"]}
        script = {"tests": ["there = descriptors()\nassert there == [0, 1, 2, 3]"]}
        stdio = task_row([("", "[0, 1, 2]\n")])
        everywhere = OPEN.format(first=0)
        for row, program in ((calls, everywhere), (script, everywhere), (stdio, f"{everywhere}print(seen)")):
            assert verifiers.verify(prompt("code", row=row), program).label is Label.CORRECT, row


def test_the_self_test_says_what_does_not_run(tier: str, monkeypatch) -> None:
    """A module that is there outside and not inside; one that ends the process; and no word of other systems' ones."""
    pytest.importorskip("numpy")
    with contextlib.closing(Runner(tier, CodeOptions(), ZygoteSpec(module="programs"))) as runner:
        assert selftest.faults(runner) == []
        (fault,) = selftest.faults(runner, ["numpy"])
        assert fault == "import numpy (ModuleNotFoundError: No module named 'numpy')"
        assert "asyncio.windows_events" in library.names()
        monkeypatch.setattr(selftest, "_IMPORTS", "import os\nprint('? gone', flush=True)\nos._exit(3)")
        assert selftest.faults(runner) == ["import gone (it ends the process)"]


def test_a_tier_in_which_an_import_fails_is_refused_by_name(tier: str, monkeypatch) -> None:
    monkeypatch.setattr(code_answer.selftest, "faults", lambda runner, modules: [f"import {n} (E)" for n in "abcdefg"])
    with (
        Verifiers(workers=1) as verifiers,
        pytest.raises(SandboxLeaks, match=r"cannot import a .*import e \(E\) and 2"),
    ):
        verifiers.verify(prompt("code", row={"tests": ["assert f() == 1"]}), "def f(): return 1")


def test_without_bubblewrap_on_the_path_the_next_tier_runs_numpy(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("numpy")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(code_answer, "machine_tiers", machine_tiers)
    with Verifiers(workers=1, code=CodeOptions(modules=("numpy",), cache_folder=str(tmp_path))) as verifiers:
        row = {"tests": ["assert f(3) == 3"]}
        program = "import numpy as n\ndef f(k): return len(n.random.rand(k))"
        assert verifiers.verify(prompt("code", row=row), program).label is Label.CORRECT
        assert verifiers._graders["code"].tier in ("landlock", "no-open")


def test_a_leaking_sandbox_is_refused(tier: str, monkeypatch) -> None:
    monkeypatch.setattr(code_answer.selftest, "leaks", lambda runner: ["reads a file of the user"])
    with Verifiers(workers=1) as verifiers, pytest.raises(SandboxLeaks, match="reads a file of the user"):
        verifiers.verify(prompt("code", row={"tests": ["assert f() == 1"]}), "def f(): return 1")


def test_a_leaking_sandbox_is_used_only_on_request_and_says_so(tier: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr(code_answer.selftest, "leaks", lambda runner: ["reads a file of the user"])
    with Verifiers(workers=1, allow_unsafe_sandbox=True) as verifiers:
        assert verifiers.verify(prompt("code", row={"tests": ["assert f() == 1"]}), "def f(): return 1").score == 1.0
    assert "UNSAFE" in caplog.text


def test_without_any_tier_nothing_runs(monkeypatch) -> None:
    monkeypatch.setattr(code_answer, "machine_tiers", lambda: ())
    with Verifiers(workers=1) as verifiers, pytest.raises(SandboxLeaks, match="neither seccomp nor Landlock"):
        verifiers.verify(prompt("code", row={"tests": ["assert f() == 1"]}), "def f(): return 1")


def test_without_any_tier_limits_run_on_request(monkeypatch) -> None:
    """What macOS has: the verdicts are as safe as ever, the machine is not."""
    monkeypatch.setattr(code_answer, "machine_tiers", lambda: ())
    with Verifiers(
        workers=1, allow_unsafe_sandbox=True, code=CodeOptions(cpu_seconds=2, wall_seconds=6.0)
    ) as verifiers:
        harmless = [attack for attack in HACKS if "os.kill" not in attack[2]]
        assert misjudged(verifiers, [*HONEST, *harmless]) == []


def test_a_dead_jail_is_replaced_and_the_job_repeated(tier: str, tmp_path: Path) -> None:
    with Verifiers(workers=1, code=options("auto", tmp_path)) as verifiers:
        row = {"tests": ["assert f() == 1"]}
        assert verifiers.verify(prompt("code", row=row), "def f(): return 1").score == 1.0
        pool = verifiers._graders["code"]._pool
        pool._workers[0].kill()
        assert verifiers.verify(prompt("code", row=row), "def f(): return 1").score == 1.0
        assert pool.restarts == 1


def test_a_jail_that_cannot_start_gives_unknown(tier: str, monkeypatch, tmp_path: Path) -> None:
    with Verifiers(workers=1, code=options("auto", tmp_path)) as verifiers:
        row = {"tests": ["assert f() == 1"]}
        assert verifiers.verify(prompt("code", row=row), "def f(): return 1").score == 1.0

        def broken(*_: object) -> None:
            raise WorkerDied("no more processes")

        monkeypatch.setattr(code_answer, "Runner", broken)
        verifiers._graders["code"]._pool._workers[0].kill()
        verdict = verifiers.verify(prompt("code", row=row), "def f(): return 1")
        assert verdict.label is Label.UNKNOWN
        assert "no more processes" in verdict.reason


def test_without_memory_files_jobs_travel_in_deleted_ones(monkeypatch, leaves_nothing: None) -> None:
    monkeypatch.delattr(os, "memfd_create")
    descriptor = memory_file(b"x" * 100_000)
    assert os.fstat(descriptor).st_nlink == 0
    with open(descriptor, "rb") as file:
        assert file.read() == b"x" * 100_000


def test_a_zygote_that_fails_says_why(tier: str) -> None:
    with pytest.raises(WorkerDied, match="no_such_module"):
        Zygote(tier, ZygoteSpec(module="programs", modules=("no_such_module",)))
