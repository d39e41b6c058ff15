"""Is the boxed answer the reference answer: cheap decisions first, then algebra in a killable worker.

Four in five answers of a training run are decided by strings and exact fractions in the caller's thread; of the rest,
identical pairs are asked once. A time-out or crash on an answer makes it wrong; a worker that cannot be had makes it
unknown.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future

from prime_lightning.rollout import Label, Verdict
from prime_lightning.verifiers.maths.compare import Question, compare, self_question
from prime_lightning.verifiers.maths.final import after_reasoning, last_lines, stated
from prime_lightning.verifiers.maths.text import boxes
from prime_lightning.verifiers.options import MathOptions
from prime_lightning.verifiers.workers.launch import ZygoteSpec, libraries
from prime_lightning.verifiers.workers.persistent import ForkServer, PersistentWorker, TimedOut, WorkerCrashed
from prime_lightning.verifiers.workers.pool import Pool

_LIBRARIES = ("math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath")


def answer_of(text: str, options: MathOptions) -> str | None:
    r"""The answer that a completion commits itself to; None where there is none.

    Several different boxes that are joined to a list are one answer: against a reference with a single answer that is
    hedging, and wrong. What `anywhere` finds beyond `final` takes a worker and is not told here.

    Example:
        >>> answer_of(r"so $x=\boxed{3}$.", MathOptions()), answer_of("The answer is 3.", MathOptions())
        ('3', None)
        >>> answer_of("The answer is 3.", MathOptions(answer="final"))
        '3'
    """
    said = after_reasoning(text, options.reasoning_tags)
    return None if said is None else _answer_in(said, options)


def _answer_in(said: str, options: MathOptions) -> str | None:
    found = list(dict.fromkeys(boxes(said)))
    if found:
        return ", ".join(found)
    return None if options.answer == "boxed" or "boxed" in said else stated(said)


class MathGrader:
    """Grades boxed answers. Thread-safe; workers start with the first question that needs algebra.

    Args:
        options: What counts as equal.
        workers: Processes for algebra.
        pending: Questions that may wait before `grade` blocks.
    """

    def __init__(self, options: MathOptions, *, workers: int, pending: int) -> None:
        self.options = options
        self._fork_server = ForkServer(
            ZygoteSpec(module="maths", path=libraries(_LIBRARIES)),
            protected=True,
            memory_bytes=options.memory_megabytes << 20,
        )
        self._pool = Pool(lambda: PersistentWorker(self._fork_server), workers=workers, pending=pending)
        self._known: OrderedDict[Question, bool] = OrderedDict()
        self._asked: dict[Question, Future[Verdict]] = {}
        self._lock = threading.Lock()

    def grade(self, reference: str, text: str) -> Future[Verdict]:
        """The verdict on a completion; the future is often done already, and never fails for what the text contains."""
        begun = time.perf_counter()
        said = after_reasoning(text, self.options.reasoning_tags)
        answer = None if said is None else _answer_in(said, self.options)
        if answer is None and self.options.answer == "anywhere" and said is not None and "boxed" not in said:
            return self._search(reference, last_lines(said))
        if answer is None:
            return _done(Verdict.of_score(0.0, reason=self._nothing(said), seconds=time.perf_counter() - begun))
        same = compare(reference, answer, self.options)
        if isinstance(same, bool):
            return _done(_verdict(same, "", time.perf_counter() - begun))
        return self._ask(same)

    def check(self, reference: str) -> Future[str]:
        """Why a reference cannot be graded against; empty if it agrees with itself.

        A number, a letter or a word does so as a string; anything else must be understood by algebra.
        """
        found: Future[str] = Future()
        question = self_question(reference)
        if isinstance(question, str):
            found.set_result(question)
            return found
        self._ask(question).add_done_callback(lambda done: found.set_result(_complaint(done.result())))
        return found

    def _ask(self, question: Question) -> Future[Verdict]:
        """Answer from memory, join the same question under way, or put it to a worker."""
        with self._lock:
            known = self._known.get(question)
            if known is not None:
                self._known.move_to_end(question)
                return _done(_verdict(known, "by algebra", 0.0))
            under_way = self._asked.get(question)
            if under_way is None:
                mine: Future[Verdict] = Future()
                self._asked[question] = mine
        if under_way is not None:
            return under_way
        try:
            job = self._pool.submit(lambda worker: self._put(question, worker))
        except BaseException:
            with self._lock:
                self._asked.pop(question, None)
            raise
        job.add_done_callback(lambda done: self._settle(question, mine, done))
        return mine

    def _put(self, question: Question, worker: PersistentWorker) -> Verdict:
        begun = time.perf_counter()
        asked = json.dumps([question.references, question.answers, question.ordered, self.options.tolerance]).encode()
        try:
            same = worker.ask(asked, cpu_seconds=self.options.seconds, wall_seconds=self.options.wall_seconds)
        except TimedOut:
            return Verdict.of_score(0.0, reason="time-out in algebra", seconds=time.perf_counter() - begun)
        verdict = _verdict(same is True, "by algebra", time.perf_counter() - begun)
        with self._lock:
            self._known[question] = verdict.label is Label.CORRECT
            while len(self._known) > self.options.cache:
                self._known.popitem(last=False)
        return verdict

    def _search(self, reference: str, lines: str) -> Future[Verdict]:
        """Compare with what math-verify takes from the last lines, which is looked for and compared in a worker."""
        if not lines:
            return _done(Verdict.of_score(0.0, reason=self._nothing("")))
        mine: Future[Verdict] = Future()
        job = self._pool.submit(lambda worker: self._found(reference, lines, worker))
        job.add_done_callback(lambda done: self._settle(None, mine, done))
        return mine

    def _found(self, reference: str, lines: str, worker: PersistentWorker) -> Verdict:
        begun = time.perf_counter()
        try:
            answer = worker.ask(
                json.dumps({"find": lines}).encode(),
                cpu_seconds=self.options.seconds,
                wall_seconds=self.options.wall_seconds,
            )
        except TimedOut:
            return Verdict.of_score(0.0, reason="time-out in search", seconds=time.perf_counter() - begun)
        if not isinstance(answer, str) or not answer:
            return Verdict.of_score(0.0, reason=self._nothing(""), seconds=time.perf_counter() - begun)
        same = compare(reference, answer, self.options)
        return (
            self._put(same, worker) if isinstance(same, Question) else _verdict(same, "", time.perf_counter() - begun)
        )

    def _nothing(self, said: str | None) -> str:
        if said is None:
            return "reasoning is not closed"
        return "no boxed answer" if self.options.answer == "boxed" else "no answer"

    def _settle(self, question: Question | None, mine: Future[Verdict], done: Future[Verdict]) -> None:
        if question is not None:
            with self._lock:
                self._asked.pop(question, None)
        if done.cancelled():
            mine.set_result(Verdict.unknown("the verifiers were closed"))
            return
        error = done.exception()
        if error is None:
            mine.set_result(done.result())
        elif isinstance(error, WorkerCrashed):  # twice, on two workers: it is the answer's doing
            mine.set_result(Verdict.of_score(0.0, reason="crash in algebra"))
        else:
            mine.set_result(Verdict.unknown(f"no maths worker: {error}"))

    def close(self) -> None:
        """End all workers. Idempotent."""
        self._fork_server.kill()
        self._pool.close()
        self._fork_server.close()


def _complaint(verdict: Verdict) -> str:
    if verdict.label is Label.CORRECT:
        return ""
    return "not equal to itself, or not understood" if verdict.known and "algebra" in verdict.reason else verdict.reason


def _done(verdict: Verdict) -> Future[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


def _verdict(same: bool, reason: str, seconds: float) -> Verdict:
    return Verdict.of_score(float(same), reason=reason or ("equal" if same else "not equal"), seconds=seconds)
