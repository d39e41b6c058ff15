"""Which share of its tests does a program pass: jailed workers, chosen by self-test, planned by calibration."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future

from prime_lightning.rollout import Prompt, Verdict
from prime_lightning.verifiers.code import selftest
from prime_lightning.verifiers.code.calibration import Calibrations, UnusableTask
from prime_lightning.verifiers.code.run import Outcome, Runner
from prime_lightning.verifiers.code.tests import Task, row_of, task_of
from prime_lightning.verifiers.code.text import LONGEST, program
from prime_lightning.verifiers.options import CodeOptions
from prime_lightning.verifiers.workers.launch import ZygoteSpec, libraries, machine_tiers
from prime_lightning.verifiers.workers.pool import Pool, WorkerDied

_log = logging.getLogger(__name__)
_NAMED = 5  # faults of a tier that are listed
_PARSED = 2048  # tasks kept parsed; the rollouts of a prompt come together


class SandboxLeaks(RuntimeError):  # noqa: N818  (what happened)
    """No tier of the sandbox holds on this machine, and the user did not allow that."""


class CodeGrader:
    """Grades programs. Thread-safe; workers start with the first program.

    Args:
        options: Limits and tier.
        workers: Jails.
        pending: Programs that may wait before `grade` blocks.
        allow_unsafe_sandbox: Run even where the self-test finds a leak, with a warning.
    """

    def __init__(self, options: CodeOptions, *, workers: int, pending: int, allow_unsafe_sandbox: bool) -> None:
        self.options = options
        self.tier = ""
        """The walls in use, once a worker has started."""
        self._allow_unsafe = allow_unsafe_sandbox
        self._spec = ZygoteSpec(module="programs", modules=options.modules, path=libraries(options.modules))
        self._choosing = threading.Lock()
        self._calibrations = Calibrations(options)
        self._tasks: OrderedDict[int, tuple[Prompt, Task | str]] = OrderedDict()
        self._tasks_lock = threading.Lock()
        self._pool = Pool(self._start, workers=workers, pending=pending)

    def grade(self, prompt: Prompt, text: str) -> Future[Verdict]:
        """The verdict on a completion's program. The future fails with `SandboxLeaks` only."""
        return self._pool.submit(lambda runner: self._verdict(prompt, text, runner))

    def check(self, prompt: Prompt) -> Future[str]:
        """Why a prompt's tests cannot be used; empty if they can, as far as its reference (or its form) tells."""
        return self._pool.submit(lambda runner: self._fault(prompt, runner))

    def _fault(self, prompt: Prompt, runner: Runner) -> str:
        task = self._task(prompt)
        if isinstance(task, str):
            return task
        try:
            self._calibrations.plan(task, runner)
        except UnusableTask as error:
            return str(error)
        return ""

    def _verdict(self, prompt: Prompt, text: str, runner: Runner) -> Verdict:
        begun = time.perf_counter()
        task = self._task(prompt)
        if isinstance(task, str):
            return Verdict.unknown(f"unusable tests: {task}")
        source = task.whole(program(text, task.entry_point))
        if len(source) > LONGEST:
            return Verdict.of_score(0.0, reason="program too long", seconds=time.perf_counter() - begun)
        try:
            outcome = runner.run(task, self._calibrations.plan(task, runner), source)
        except UnusableTask as error:
            return Verdict.unknown(f"unusable tests: {error}", seconds=time.perf_counter() - begun)
        score = outcome.share if self.options.partial else float(outcome.share == 1.0)
        return Verdict.of_score(score, reason=_reason(outcome), seconds=time.perf_counter() - begun)

    def _task(self, prompt: Prompt) -> Task | str:
        """The tests of a prompt, or why they cannot be read."""
        with self._tasks_lock:
            known = self._tasks.get(id(prompt))
            if known is not None:
                return known[1]
        try:
            task: Task | str = self._runnable(task_of(row_of(prompt)))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            task = f"{type(error).__name__}: {error}"
        with self._tasks_lock:
            self._tasks[id(prompt)] = prompt, task  # the prompt is held, so its id stays its own
            while len(self._tasks) > _PARSED:
                self._tasks.popitem(last=False)
        return task

    def _runnable(self, task: Task) -> Task:
        absent = [name for name in task.needs if name not in self.options.modules]
        if absent:
            raise ValueError(f"the tests import {', '.join(absent)}, which the code option `modules` does not name")
        return task

    def _start(self) -> Runner:
        with self._choosing:
            if not self.tier:
                return self._choose()
        return Runner(self.tier, self.options, self._spec)

    def _choose(self) -> Runner:
        """Start the first tier whose self-test leaks nothing."""
        tiers = machine_tiers() if self.options.tier == "auto" else (self.options.tier,)
        findings = []
        for tier in (*tiers, "limits"):
            if tier == "limits" and not self._allow_unsafe:
                break
            try:
                runner = Runner(tier, self.options, self._spec)
            except WorkerDied as error:
                findings.append(str(error))
                continue
            finding = self._examine(runner)
            if not finding or self._allow_unsafe:
                self.tier = tier
                self._announce(finding)
                return runner
            findings.append(f"{tier}: {finding}")
            runner.close()
        raise SandboxLeaks(
            "No sandbox holds on this machine, so no program of a model is run. What was tried: "
            + ("; ".join(findings) or "nothing, this system has neither seccomp nor Landlock")
            + ". Use Linux 5.13 or newer on x86_64 or aarch64, or accept the risk with --allow-unsafe-sandbox."
        )

    def _examine(self, runner: Runner) -> str:
        try:
            escaped = selftest.leaks(runner)
            failed = selftest.faults(runner, self.options.modules)
        except WorkerDied as error:
            return str(error)
        except BaseException:
            runner.close()
            raise
        if failed:
            more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
            return f"an honest program cannot {', '.join(failed[:_NAMED])}{more}"
        return f"a program {', '.join(escaped)}" if escaped else ""

    def _announce(self, finding: str) -> None:
        if finding:
            _log.warning("UNSAFE: programs of the model run in the tier `%s`, where %s.", self.tier, finding)
        else:
            _log.info("Programs run in the tier `%s`; its self-test found no leak.", self.tier)

    def close(self) -> None:
        """End all workers. Idempotent."""
        self._pool.close()


def _reason(outcome: Outcome) -> str:
    if outcome.fault:
        return outcome.fault
    if outcome.share == 1.0:
        return "all tests passed"
    return f"{outcome.reason.replace(':', ',')}: {sum(outcome.passed)} of {len(outcome.passed)} tests passed"
