"""`Verifiers`: dispatch, a user's own functions, remote verifiers, counts, references, life and death of workers."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from prime_lightning.rollout import Label, Prompt, Verdict
from prime_lightning.verifiers import CodeOptions, HttpVerifier, UserOptions, Verifiers, verify

from .conftest import TIERS, prompt

HERE = f"{__package__}.functions"


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("7", "3+4=7 # 7", 1.0),
        ("7", "# 8 # 7 ", 1.0),
        ("7", "# 7 # 8", 0.0),
        ("7", "7", 0.0),
        ("7", "#", 0.0),
        ("7", "#7.0", 0.0),
        ("x y", "#  x y\n", 1.0),
    ],
)
def test_exact(answer: str, text: str, score: float) -> None:
    with Verifiers() as verifiers:
        future = verifiers.submit(prompt("exact", answer), text)
        assert future.done()
        assert future.result().score == score


def test_exact_and_easy_maths_start_no_process(leaves_nothing: None) -> None:
    verifiers = Verifiers()
    assert verifiers.verify(prompt("exact", "7"), "# 7").score == 1.0
    assert verifiers.verify(prompt("math", "7"), r"\boxed{7}").score == 1.0
    assert not verifiers._graders["math"]._pool._threads


def test_the_module_level_function() -> None:
    assert verify(prompt("exact", "2"), "1+1=2 # 2") == Verdict.of_score(1.0, reason="compared exactly")


@pytest.mark.parametrize("kind", ["", "maths", "no_such", "a..b", "code-ish"])
def test_an_unknown_kind_says_what_was_expected(kind: str) -> None:
    with Verifiers() as verifiers, pytest.raises(ValueError, match="Expected a prompt's kind"):
        verifiers.submit(prompt(kind), "x")


@pytest.mark.parametrize(
    ("function", "text", "label", "reason"),
    [
        ("share_of_a", "aab", Label.PARTIAL, ""),
        ("share_of_a", "aaa", Label.CORRECT, ""),
        ("share_of_a", "bbb", Label.WRONG, ""),
        ("share_of_a", "", Label.UNKNOWN, "ZeroDivisionError"),
        ("answer_is_in", "it is 42", Label.CORRECT, ""),
        ("hangs", "fine", Label.CORRECT, ""),
        ("hangs", "hang", Label.UNKNOWN, "time-out"),
        ("sleeps", "", Label.UNKNOWN, "time-out"),
        ("raises", "", Label.UNKNOWN, "KeyError"),
        ("dies", "", Label.UNKNOWN, "broke off"),
        ("too_much", "", Label.UNKNOWN, "returned 7.0"),
        ("no_number", "", Label.UNKNOWN, "ValueError"),
        ("no_such_function", "", Label.UNKNOWN, "no_such_function"),
        ("opens_socket", "", Label.CORRECT, ""),
        ("sees_environment", "", Label.CORRECT, ""),
    ],
)
def test_own_functions(function: str, text: str, label: Label, reason: str, monkeypatch, leaves_nothing: None) -> None:
    monkeypatch.setenv("PRIME_TEST_TOKEN", "seen")
    with Verifiers(workers=1, user=UserOptions(seconds=1.0, wall_seconds=2.0)) as verifiers:
        verdict = verifiers.verify(prompt(f"{HERE}.{function}", "42", {"n": 3}), text)
        assert verdict.label is label, verdict
        assert reason in verdict.reason


@pytest.mark.skipif(not TIERS, reason="no sandbox here")
@pytest.mark.parametrize(
    ("function", "label"),
    [("share_of_a", Label.CORRECT), ("opens_socket", Label.UNKNOWN), ("sees_environment", Label.WRONG)],
)
def test_own_functions_behind_walls(tier: str, function: str, label: Label, monkeypatch) -> None:
    monkeypatch.setenv("PRIME_TEST_TOKEN", "seen")
    with Verifiers(workers=1, user=UserOptions(sandbox=True)) as verifiers:
        assert verifiers.verify(prompt(f"{HERE}.{function}"), "aaa").label is label


class _Service(BaseHTTPRequestHandler):
    """Answers as the completion says: `ok 0.5`, `status 500`, `slow`, `broken`, `flaky`."""

    asked: list[dict[str, str]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        what, _, value = body["completion"].partition(" ")
        status, content = 200, json.dumps({"score": 1.0, "reason": "fine"})
        if what == "ok":
            content = json.dumps({"score": float(value)})
        elif what == "status":
            status = int(value)
        elif what == "flaky" and len(self.asked) < 3:
            status = 503
        elif what == "broken":
            content = value
        elif what == "slow":
            time.sleep(3)
        elif what == "redirect":
            status = 302
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[tuple[str, list[dict[str, str]]]]:
    asked: list[dict[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Service", (_Service,), {"asked": asked}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/grade?x=1", asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("text", "label", "attempts"),
    [
        ("ok 1.0", Label.CORRECT, 1),
        ("ok 0.25", Label.PARTIAL, 1),
        ("ok 3", Label.UNKNOWN, 1),
        ("flaky", Label.CORRECT, 3),
        ("status 500", Label.UNKNOWN, 3),
        ("status 404", Label.UNKNOWN, 1),
        ("redirect", Label.UNKNOWN, 1),
        ("broken {", Label.UNKNOWN, 1),
        ("broken []", Label.UNKNOWN, 1),
        ('broken {"score": null}', Label.UNKNOWN, 1),
        ("broken " + "[" * 70_000, Label.UNKNOWN, 1),
        ("slow", Label.UNKNOWN, 3),
    ],
)
def test_a_remote_verifier(service: tuple[str, list[dict[str, str]]], text: str, label: Label, attempts: int) -> None:
    url, asked = service
    remotes = {"judge": HttpVerifier(url=url, seconds=0.5, retries=2, pause=0.01, connections=2)}
    with Verifiers(remotes=remotes) as verifiers:
        assert verifiers.verify(prompt("judge", "42"), text).label is label
    assert len(asked) == attempts
    assert asked[0] == {"prompt": "question", "completion": text, "answer": "42", "source": "test", "kind": "judge"}


def test_a_remote_verifier_must_be_http() -> None:
    with pytest.raises(ValueError, match="http://"):
        HttpVerifier(url="file:///etc/passwd")


def test_closing_breaks_off_a_remote_request(service: tuple[str, list[dict[str, str]]]) -> None:
    verifiers = Verifiers(remotes={"judge": HttpVerifier(url=service[0], seconds=60.0)})
    future = verifiers.submit(prompt("judge"), "slow")
    while not service[1]:
        time.sleep(0.01)
    verifiers.close()
    assert future.result(timeout=10).label is Label.UNKNOWN


def test_references_are_checked_for_every_kind(tier: str, tmp_path: Path) -> None:
    prompts = [
        prompt("exact", "7"),
        prompt("exact", " "),
        prompt("math", r"\frac{1}{2}"),
        prompt(f"{HERE}.raises"),
    ]
    if TIERS:
        good = {"tests": ["assert f(1) == 2"], "reference_solution": "def f(x): return x + 1"}
        prompts += [
            prompt("code", row=good),
            prompt("code", row={**good, "tests": ["assert f(1) == 3"]}),
            prompt("code", row={}),
        ]
    with Verifiers(workers=1, code=CodeOptions(cache_folder=str(tmp_path))) as verifiers:
        report = verifiers.check_references(prompts)
        assert [one.row for one in report.bad] == ([1, 5, 6] if TIERS else [1])
        if TIERS:
            assert "the reference fails its tests" in report.bad[1].reason
            verdict = verifiers.verify(prompts[5], "def f(x): return 3")
            assert verdict.label is Label.UNKNOWN
            assert verdict.reason.startswith("unusable tests")


def test_a_pickled_copy_has_its_own_workers(tier: str) -> None:
    with Verifiers(workers=1) as verifiers:
        verifiers.verify(prompt("math", "x^2"), r"\boxed{x\cdot x}")
        copy = pickle.loads(pickle.dumps(verifiers))
        assert not copy._graders
        with copy:
            assert copy.verify(prompt("exact", "1"), "# 1").score == 1.0


def test_after_close_nothing_is_left_and_nothing_runs(tier: str, leaves_nothing: None) -> None:
    verifiers = Verifiers(workers=2)
    futures = [verifiers.submit(prompt("math", "x^2"), rf"\boxed{{x^2+{n}-{n}}}") for n in range(20)]
    verifiers.close()
    verifiers.close()
    assert {future.result(timeout=20).label for future in futures} <= {Label.CORRECT, Label.UNKNOWN}
    with pytest.raises(RuntimeError, match="closed"):
        verifiers.submit(prompt("math", "1"), r"\boxed{x}")


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (prompt("math", "x^2"), r"\boxed{x\cdot x}"),
        (prompt(f"{HERE}.share_of_a"), "a"),
        pytest.param(
            prompt("code", row={"tests": ["assert f() == 1"]}),
            "def f(): return 1",
            marks=pytest.mark.skipif(not TIERS, reason="no walls on this machine"),
        ),
    ],
)
def test_whichever_process_is_killed_the_verdict_comes(tier: str, asked: Prompt, text: str) -> None:
    with Verifiers(workers=1) as verifiers:
        assert verifiers.verify(asked, text).score == 1.0
        for number in range(4):  # the jail, its zygote, a worker: whatever there is now
            processes = sorted(_below(os.getpid()))
            os.kill(processes[number % len(processes)], signal.SIGKILL)
            assert verifiers.verify(asked, text).score == 1.0


def test_a_forked_process_starts_its_own_workers(tier: str) -> None:
    with Verifiers(workers=1) as verifiers:
        pair = prompt("math", "x^2"), r"\boxed{x\cdot x}"
        assert verifiers.verify(*pair).score == 1.0
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if verifiers.verify(*pair).score == 1.0 else 2
                verifiers.close()
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert verifiers.verify(prompt("math", "x^3"), r"\boxed{x\cdot x^2}").score == 1.0


PROGRAM = r"""
import os, signal, sys, time
from prime_lightning.rollout import Prompt
from prime_lightning.verifiers import Verifiers
from prime_lightning.verifiers.code import answer as code_answer
from prime_lightning.verifiers.workers import persistent
code_answer.machine_tiers = persistent.machine_tiers = lambda: tuple(sys.argv[4:])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with SIGINT ignored
verifiers = Verifiers(workers=2)
kinds = [("math", {}, r"\boxed{x\cdot x}", "x^2")]
if sys.argv[2] == "code":
    kinds.append(("code", {"tests": ["assert f() == 1"]}, "def f(): return 1", ""))
for kind, row, text, answer in kinds:
    verifiers.verify(Prompt(draw=0, token_ids=(), text="", kind=kind, answer=answer, row=row), text)
for _ in range(4):
    verifiers.submit(Prompt(draw=0, token_ids=(), text="", kind="math", answer="2"), r"\boxed{9^{9^{9^{9}}}}")
hangs = Prompt(draw=0, token_ids=(), text="", kind=sys.argv[3])
assert verifiers.verify(hangs, "fine").score == 1.0
verifiers.submit(hangs, "hang")
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[1] == "raise":
    raise SystemError("the trainer crashes")
time.sleep(0 if sys.argv[1] == "exit" else 60)
"""


@pytest.mark.parametrize("end", ["exit", "raise", "interrupt", "kill", "terminate"])
def test_however_the_trainer_ends_no_process_is_left(tier: str, end: str, tmp_path: Path, leaves_nothing: None) -> None:
    """Workers still busy; for SIGKILL and SIGTERM none of our code can run."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PROGRAM, end, "code" if TIERS else "", f"{HERE}.hangs", *([tier] if TIERS else [])]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"ready\n", trainer.communicate()
        below = _below(trainer.pid)
        number = {"interrupt": signal.SIGINT, "kill": signal.SIGKILL, "terminate": signal.SIGTERM}.get(end)
        if number is not None:
            trainer.send_signal(number)
        trainer.communicate(b"\n", timeout=180)
    assert below or not os.path.isdir("/proc")
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in below):
            return
        time.sleep(0.1)
    raise AssertionError(f"processes are left: {[pid for pid in below if os.path.exists(f'/proc/{pid}')]}")


def _below(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            for child in map(int, task.read_text().split()):
                found += [child, *_below(child)]
    return found
