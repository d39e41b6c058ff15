"""Answers written to hang, crash or take over the grader."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prime_lightning.rollout import Label
from prime_lightning.verifiers import MathOptions, Verifiers
from prime_lightning.verifiers.code.text import program
from prime_lightning.verifiers.maths.compare import compare
from prime_lightning.verifiers.maths.final import after_reasoning, last_lines, stated
from prime_lightning.verifiers.maths.text import boxes
from prime_lightning.verifiers.workers.launch import ZygoteSpec, libraries
from prime_lightning.verifiers.workers.persistent import ForkServer, PersistentWorker, TimedOut, WorkerCrashed

from .conftest import prompt

HANGING = {
    "tower": "9^{9^{9^{9}}}",
    "tower in braces": "{9}^{{9}^{{9}^{9}}}",
    "stars": "10**10**10",
    "factorial": "99999999!",
    "small factorials": "((7!)!)!",
    "binomial": r"\binom{10^9}{5\cdot10^8}",
    "nested parentheses": "(" * 40 + "1" + ")" * 40,
    "nested fractions": r"\frac{1}{" * 60 + "2" + "}" * 60,
    "nested roots": r"\sqrt{" * 80 + "2" + "}" * 80,
    "ten thousand deep": "{" * 10_000 + "1" + "}" * 10_000,
    "ten thousand parentheses": "(" * 10_000 + "1" + ")" * 10_000,
    "long digits": "7" * 100_000,
    "long sum": "+".join(["x"] * 400),
    "long list": ",".join(map(str, range(300))),
    "long product": r"\cdot".join(["(x+1)"] * 120),
    "sum": r"\sum_{k=1}^{10^9} \frac{1}{k^2}",
    "integral": r"\int_0^1 \sin(x^{x^x})dx",
    "product": r"\prod_{k=1}^{10^8} k",
    "gcd": r"\gcd(10^{500}!, 3)",
    "expand": "(a+b+c+d+e)^{200}",
    "determinant": r"\det\begin{pmatrix}" + r"\\".join("&".join(f"x^{i}{j}" for j in "0123456789") for i in "12345"),
    "exponent": "1e999999999",
    "decimal": "0." + "3" * 900,
    "limit": r"\lim_{n\to\infty} (1+\frac{1}{n})^{n^{n^n}}",
}  # fmt: skip

INJECTIONS = [
    "__import__('pathlib').Path(MARK).touch()",
    r"\text{__import__('pathlib').Path(MARK).touch()}",
    "exec(\"open(MARK,'w')\")",
    r"\operatorname{eval}(open(MARK,'w'))",
    "(lambda: open(MARK,'w'))()",
    "[open(MARK,'w') for x in (1,)][0]",
    "{open(MARK,'w')}",
    "1 if open(MARK,'w') else 2",
    "x=open(MARK,'w')",
    "().__class__.__base__.__subclasses__()[0](open(MARK,'w'))",
    "f'{open(MARK)}'",
    "Symbol('x').__class__.__init__.__globals__['os'].system('touch MARK')",
    "os.system('touch MARK')",
    "`touch MARK`; $(touch MARK)",
    r"\input{MARK}",
    r"\write18{touch MARK}",
]


@pytest.mark.timeout(240)
def test_nothing_takes_longer_than_its_limit(tier: str, leaves_nothing: None) -> None:
    """The bound here is wide, for a busy machine; the benchmark measures the excess over the limit."""
    options = MathOptions(seconds=1.0, wall_seconds=4.0)
    with Verifiers(workers=2, math=options) as verifiers:
        assert verifiers.verify(prompt("math", "x^2"), r"\boxed{x\cdot x}").score == 1.0
        for name, answer in HANGING.items():
            begun = time.monotonic()
            verdict = verifiers.verify(prompt("math", "12"), rf"\boxed{{{answer}}}")
            assert verdict.label is Label.WRONG, (name, verdict)
            assert time.monotonic() - begun < 10, name
        assert verifiers.verify(prompt("math", "x^3"), r"\boxed{x\cdot x^2}").score == 1.0


def test_no_last_line_takes_longer_than_its_limit(tier: str, leaves_nothing: None) -> None:
    """Where answers are looked for anywhere, the search runs in the worker, too."""
    lines = [
        "$" * 900,
        "$1" * 400,
        "1 " * 450,
        "(1+" * 300,
        "answer" * 150,
        "$1$," * 200,
        "1,000" * 190,
        r"\[ \(" * 150,
    ]
    with Verifiers(workers=2, math=MathOptions(seconds=1.0, wall_seconds=4.0, answer="anywhere")) as verifiers:
        assert verifiers.verify(prompt("math", "33"), "Therefore, the value is $33$.").score == 1.0
        for line in lines + [f"so it is ${HANGING[name]}$" for name in ("tower", "factorial", "stars", "nested roots")]:
            begun = time.monotonic()
            assert verifiers.verify(prompt("math", "12"), line).label is Label.WRONG, line
            assert time.monotonic() - begun < 10, line


def test_a_hanging_reference_does_not_hang_the_check(tier: str) -> None:
    with Verifiers(workers=1, math=MathOptions(seconds=1.0)) as verifiers:
        report = verifiers.check_references([prompt("math", "9^{9^{9^{9}}}-1"), prompt("math", "x+1")])
        assert report.checked == 2
        assert 1 in report.usable


def test_no_text_is_executed(tier: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    with Verifiers(workers=1, math=MathOptions(seconds=1.0, answer="anywhere")) as verifiers:
        for payload in INJECTIONS:
            text = payload.replace(
                "MARK", repr(str(mark)) if "open(MARK" in payload or "Path(MARK" in payload else str(mark)
            )
            for wrapped in (rf"\boxed{{{text}}}", f"The answer is: {text}", text, f"so ${text}$."):
                for reference in ("12", r"\sqrt{2}", "(1,2)"):
                    assert verifiers.verify(prompt("math", reference), wrapped).score == 0.0
    assert not mark.exists()


def test_workers_do_not_use_gmpy2(tier: str) -> None:
    """Its long operations cannot be interrupted; sympy picks it up by itself where it is installed."""
    probe = ZygoteSpec(
        module="maths", path=libraries(("math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath"))
    )
    fork_server = ForkServer(probe, protected=True, memory_bytes=2 << 30)
    worker = PersistentWorker(fork_server)
    try:
        question = json.dumps([["2"], ["10000000!"], True, 1e-6]).encode()
        with pytest.raises(TimedOut):
            worker.ask(question, cpu_seconds=0.5, wall_seconds=5)
        again = json.dumps([[r"\sqrt{8}"], [r"2\sqrt{2}"], True, 1e-6]).encode()
        assert worker.ask(again, cpu_seconds=5, wall_seconds=20) is True
    finally:
        worker.close()
        fork_server.close()


def test_a_killed_worker_is_told_from_a_wrong_answer(tier: str) -> None:
    fork_server = ForkServer(
        ZygoteSpec(module="maths", path=libraries(("math_verify", "sympy"))), protected=True, memory_bytes=2 << 30
    )
    worker = PersistentWorker(fork_server)
    try:
        worker.kill()
        with pytest.raises(WorkerCrashed):
            worker.ask(b'[["1"],["x"],true,0]', cpu_seconds=2, wall_seconds=5)
    finally:
        worker.close()
        fork_server.close()


def test_from_threads_and_coroutines(tier: str) -> None:
    with Verifiers(workers=2) as verifiers:
        pairs = [(rf"\sqrt{{{n * n * 2}}}", rf"\boxed{{{n}\sqrt{{2}}}}") for n in range(2, 22)]
        with ThreadPoolExecutor(4) as threads:
            verdicts = list(threads.map(lambda pair: verifiers.verify(prompt("math", pair[0]), pair[1]), pairs))
        assert {verdict.label for verdict in verdicts} == {Label.CORRECT}

        async def together() -> list[object]:
            return await asyncio.gather(
                *(asyncio.wrap_future(verifiers.submit(prompt("math", a), b)) for a, b in pairs)
            )

        assert all(verdict.score == 1.0 for verdict in asyncio.run(together()))  # type: ignore[attr-defined]
        assert threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize("length", [1_000, 10_000, 100_000])
@pytest.mark.parametrize(
    "unit",
    [
        r"\boxed",
        r"\boxed{",
        "{",
        "}",
        "\\",
        "$",
        "\u200b",
        "²",
        ",",
        " ",
        "(",
        "√",
        r"\text{",
        "1,",
        "^",
        "½",
        r"\aa",
        "(\\aa",
        "`",
        "~",
        "```",
        "\n",
        "\t",
        "def ",
        "a_",
        "1.",
        r"\pm",
        "answer is",
        "**",
        "answer: ",
        "#### ",
        "A:\n",
        "$1$ or ",
        "\\(",
        "<answer>",
        "<think>",
        "</think>",
        r"1\text{a} ",
    ],
)
def test_string_work_is_linear(unit: str, length: int) -> None:
    """Quadratic work on 100,000 characters would take minutes and meet the time-out of the test."""
    text = unit * (length // len(unit))
    for hostile in (text, text + "}", "(" + text, text + "`", "```python\n" + text, "\n" + text + "x"):
        boxes(hostile)
        boxes(r"\boxed{" + hostile + "}")
        program(hostile, "f")
        stated(hostile)
        last_lines(hostile)
        after_reasoning(hostile, MathOptions().reasoning_tags)
        for other in ("1", "(x,y)=1", r"5\text{ cm}", hostile[:1000]):
            compare(other, hostile[:1000], MathOptions())
            compare(hostile[:1000], other, MathOptions())
