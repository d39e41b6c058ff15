"""Run one program against one task in one jail, and read what came out of it: the only place that sees both sides.

Protects: output is parsed as strict JSON, each result must come exactly once, and values are matched here; the
program never sees what they are matched with. A program that times out, is killed, floods or sends frames of its own
is wrong as a whole.
Leaves out: tests that are too weak, and programs that hard-code the examples of their prompt.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
from dataclasses import dataclass
from typing import Any

from prime_lightning.verifiers.code.matcher import Matching, matches
from prime_lightning.verifiers.code.tests import Task
from prime_lightning.verifiers.jail import wire
from prime_lightning.verifiers.options import CodeOptions
from prime_lightning.verifiers.workers.launch import ZygoteSpec
from prime_lightning.verifiers.workers.sandbox import Report, Zygote, memory_file

_SIGNAL = 0x7F
_ROOMY = 2048  # megabytes of address space for programs of ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to run a task; found by calibration where there is a reference.

    Example:
        >>> Plan(mode="calls").in_place
        False
    """

    mode: str
    """`calls`, `script` or `stdio`."""
    in_place: bool = False
    """Whether changes of arguments reach the tests (`script`)."""
    asserts: tuple[int, ...] = ()
    """Asserts that each test must execute (`script`), -1 for any number; empty is at least one in each."""
    cpu_seconds: int = 0
    """Limit for this task; 0 is the options' value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a program did.

    Example:
        >>> Outcome(passed=(True, False)).share
        0.5
    """

    passed: tuple[bool, ...] = ()
    """For each test."""
    fault: str = ""
    """Why the program is wrong as a whole, whatever it passed; empty if it is not."""
    reason: str = ""
    """Why the first failing test failed."""
    asserts: tuple[int, ...] = ()
    """Asserts executed by each test (`script`)."""
    cpu_seconds: float = 0.0

    @property
    def share(self) -> float:
        """Share of tests passed; 0 for a fault."""
        return 0.0 if self.fault or not self.passed else sum(self.passed) / len(self.passed)


class Runner:
    """A worker for programs: one zygote, one job at a time.

    Args:
        tier: The walls.
        options: Limits.
    """

    def __init__(self, tier: str, options: CodeOptions, spec: ZygoteSpec) -> None:
        self._options = options
        self._zygote = Zygote(tier, spec)

    def kill(self) -> None:
        """End the jail now."""
        self._zygote.kill()

    def close(self) -> None:
        """End the jail and free everything."""
        self._zygote.close()

    def run(self, task: Task, plan: Plan, source: str) -> Outcome:
        """Run a program as planned.

        Raises:
            WorkerDied: The jail failed, not the program.
        """
        return {"calls": self._calls, "script": self._script, "stdio": self._stdio}[plan.mode](task, plan, source)

    def printed(self, source: str, *, cpu_seconds: int) -> Report:
        """What a program of ours prints in the jail, and how it ended.

        Raises:
            WorkerDied: The jail failed.
        """
        return self._job(Plan(mode="stdio", cpu_seconds=cpu_seconds), [source.encode(), b""], 0, _ROOMY)

    def _job(self, plan: Plan, inputs: list[bytes], expected_size: int, megabytes: int = 0) -> Report:
        cpu_seconds = plan.cpu_seconds or self._options.cpu_seconds
        job = {
            "mode": plan.mode,
            "cpu_seconds": cpu_seconds,
            "wall_seconds": max(self._options.wall_seconds, 3.0 * cpu_seconds),
            "memory_bytes": max(self._options.memory_megabytes, megabytes) << 20,
        }
        files = [memory_file(content) for content in inputs]
        try:
            output, theirs = os.pipe()
        except BaseException:
            for descriptor in files:
                os.close(descriptor)
            raise
        descriptors = [files[0], theirs, *files[1:]] if plan.mode == "script" else [*files, theirs]
        most = (self._options.output_kilobytes << 10) + 4 * expected_size
        return self._zygote.run(job, descriptors, output, most_output=most)

    def _fault(self, plan: Plan, report: Report) -> str:
        """Why the run as a whole is wrong, by the way its processes ended."""
        if report.stopped == "output":
            return "too much output"
        limit = plan.cpu_seconds or self._options.cpu_seconds
        signals = [status & _SIGNAL for status in report.statuses]
        # The kernel sends the signal at the limit as it counts by ticks, which may be more than what it reports.
        if report.stopped or signal.SIGXCPU in signals or max(report.cpu_seconds) >= limit:
            return "time-out"
        return f"killed by signal {signals[0]}" if signals[0] else ""

    def _calls(self, task: Task, plan: Plan, source: str) -> Outcome:
        pairs, how = _expected_calls(task, source, self._tolerance(task))
        payload = _payload({"source": source, "setup": task.setup, "calls": [expression for expression, _ in pairs]})
        report = self._job(plan, [payload], len(repr(pairs)))
        fault = self._fault(plan, report)
        results: dict[int, bool] = {}
        reason = ""
        for line in report.output.split(b"\n")[:-1] if not fault else ():
            match _loads(line):
                case ["V", int(index), data] if index not in results and 0 <= index < len(pairs):
                    results[index] = _agrees(pairs[index][1], data, how)
                    reason = reason or ("" if results[index] else "wrong value")
                case ["O" | "E" as tag, int(index), str(what)] if index not in results and 0 <= index < len(pairs):
                    results[index] = False
                    reason = reason or f"{'a value that does not travel' if tag == 'O' else 'raised'}: {what[:80]}"
                case ["X", str(what)]:
                    return Outcome(
                        passed=(False,) * len(pairs),
                        reason=f"does not load: {what[:80]}",
                        cpu_seconds=sum(report.cpu_seconds),
                    )
                case _:
                    fault = "bad frame"
                    break
        if not fault and (len(results) != len(pairs) or report.statuses[0]):
            fault = "ended early"
        passed = tuple(results.get(index, False) for index in range(len(pairs)))
        return Outcome(passed=passed, fault=fault, reason=reason, cpu_seconds=sum(report.cpu_seconds))

    def _script(self, task: Task, plan: Plan, source: str) -> Outcome:
        tests = {
            "tests": task.tests,
            "setup": task.setup,
            "names": task.names,
            "modules": dict(task.modules),
            "aliases": task.aliases,
            "in_place": plan.in_place,
        }
        program = {"source": source, "names": task.names}
        report = self._job(plan, [_payload(tests), _payload(program)], 0)
        fault = self._fault(plan, report)
        failed = (False,) * len(task.tests)
        cpu_seconds = sum(report.cpu_seconds)
        if fault:
            return Outcome(passed=failed, fault=fault, cpu_seconds=cpu_seconds)
        match _loads(report.output.strip()):
            case ["T", *entries]:
                pass
            case ["X", str(what)]:
                return Outcome(passed=failed, reason=f"does not load: {what[:80]}", cpu_seconds=cpu_seconds)
            case _:
                return Outcome(passed=failed, fault="ended early", cpu_seconds=cpu_seconds)
        if len(entries) != len(task.tests) or any(entry[2] == "lost" for entry in entries):
            return Outcome(passed=failed, fault="ended early", cpu_seconds=cpu_seconds)
        counts = tuple(entry[1] for entry in entries)
        enough = [plan.asserts[i] in (count, -1) if plan.asserts else count > 0 for i, count in enumerate(counts)]
        passed = tuple(entry[0] is True and good for entry, good in zip(entries, enough, strict=True))
        errors = (entry[2] or "asserts were skipped" for entry, good in zip(entries, passed, strict=True) if not good)
        return Outcome(passed=passed, reason=next(errors, ""), asserts=counts, cpu_seconds=cpu_seconds)

    def _stdio(self, task: Task, plan: Plan, source: str) -> Outcome:
        """A fresh process for each case; the first time-out, flood or signal ends it all."""
        encoded = source.encode("utf-8", "surrogatepass")
        passed: list[bool] = []
        reason, cpu_seconds = "", 0.0
        for stdin, stdout in task.stdio:
            report = self._job(plan, [encoded, stdin.encode("utf-8", "surrogatepass")], len(stdout))
            cpu_seconds = max(cpu_seconds, sum(report.cpu_seconds))
            fault = self._fault(plan, report)
            if fault:
                rest = (False,) * (task.size - len(passed))
                return Outcome(passed=(*passed, *rest), fault=fault, cpu_seconds=cpu_seconds)
            good = report.clean and same_output(report.output, stdout, self._tolerance(task))
            passed.append(good)
            reason = reason or ("" if good else "wrong output" if report.clean else "exit code is not 0")
            if not good and not self._options.partial:
                passed += [False] * (task.size - len(passed))
                break
        return Outcome(passed=tuple(passed), reason=reason, cpu_seconds=cpu_seconds)

    def _tolerance(self, task: Task) -> float:
        return self._options.tolerance if task.tolerance is None else task.tolerance


def _payload(value: Any) -> bytes:
    return json.dumps(value).encode()  # ASCII: lone surrogates travel as escapes


def _loads(line: bytes) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return wire.loads(line)
    return None


def _expected_calls(task: Task, source: str, tolerance: float) -> tuple[list[tuple[str, Any]], Matching]:
    if task.calls is not None and task.tests:
        return [(call.expression, call.expected) for call in task.calls], Matching(tolerance=tolerance)
    target = _where(task.entry_point, source)
    pairs = [(f"{target}({', '.join(map(repr, arguments))})", expected) for arguments, expected in task.functions]
    return pairs, Matching(tolerance=tolerance, json=True)


def _where(function: str, source: str) -> str:
    """How a program's function is called: by its name, or as the method of the class that has it, `Solution` first."""
    name = re.escape(function)
    if re.search(rf"^(?:async )?(?:def {name}\b|{name} *=)", source, re.MULTILINE):
        return function
    classes = re.findall(r"^class (\w+)(.*(?:\n(?:[ \t#].*)?)*)", source, re.MULTILINE)
    having = [kind for kind, body in classes if re.search(rf"^[ \t]+(?:async )?def {name}\b", body, re.MULTILINE)]
    kinds = [kind for kind, _ in classes if kind == "Solution"] or having
    return f"{kinds[-1]}().{function}" if kinds else function


def _agrees(expected: Any, data: Any, how: Matching) -> bool:
    """With JSON's results, `[value]` may stand for `value`: APPS wraps some of them."""
    try:
        wrapped = how.json and type(expected) is list and len(expected) == 1
        return matches(expected, data, how) or (wrapped and matches(expected[0], data, how))
    except RecursionError:
        return False


def same_output(output: bytes, expected: str, tolerance: float = 0.0) -> bool:
    r"""Whether two printouts agree, line by line, but for white space at the ends of lines and of the whole.

    Args:
        output: What the program wrote.
        expected: What it should.
        tolerance: Relative and absolute error allowed to numbers, where lines have as many words.

    Example:
        >>> same_output(b"1 \n2\n\n", "1\n2"), same_output(b"1.0", "1"), same_output(b"0.30000001", "0.3", 1e-6)
        (True, False, True)
    """
    try:
        text = output.decode()
    except UnicodeDecodeError:
        return False
    given = [line.rstrip() for line in text.rstrip().split("\n")]
    wanted = [line.rstrip() for line in expected.rstrip().split("\n")]
    if given == wanted:
        return True
    if not tolerance or len(given) != len(wanted):
        return False
    return all(_same_words(a.split(), b.split(), tolerance) for a, b in zip(given, wanted, strict=True))


def _same_words(given: list[str], wanted: list[str], tolerance: float) -> bool:
    return len(given) == len(wanted) and all(
        a == b or _close(a, b, tolerance) for a, b in zip(given, wanted, strict=True)
    )


def _close(given: str, wanted: str, tolerance: float) -> bool:
    try:
        return len(given) < 400 and math.isclose(float(given), float(wanted), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False
