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
from prime_lightning.verifiers.lasting import Brood, LastingWorker, TimedOut, WorkerCrashed
from prime_lightning.verifiers.launch import Guest, libraries
from prime_lightning.verifiers.math_compare import Question, compare, self_question
from prime_lightning.verifiers.math_text import boxes, stated
from prime_lightning.verifiers.options import MathOptions
from prime_lightning.verifiers.pool import Pool

_LIBRARIES = ("math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath")


def answer_of(text: str, options: MathOptions) -> str | None:
    r"""The answer that a completion commits itself to; None where there is none.

    Several different boxes in the final sentence are one list: against a reference with a single answer that is
    hedging, and wrong.

    Example:
        >>> answer_of(r"so $x=\boxed{3}$.", MathOptions()), answer_of("so x = 3", MathOptions())
        ('3', None)
    """
    found = list(dict.fromkeys(boxes(text)))
    if not found and not options.box and "boxed" not in text:
        return stated(text)
    return ", ".join(found) if found else None


class MathGrader:
    """Grades boxed answers. Thread-safe; workers start with the first question that needs algebra.

    Args:
        options: What counts as equal.
        workers: Processes for algebra.
        pending: Questions that may wait before `grade` blocks.
    """

    def __init__(self, options: MathOptions, *, workers: int, pending: int) -> None:
        self.options = options
        self._brood = Brood(
            Guest(module="maths", path=libraries(_LIBRARIES)),
            protected=True,
            memory_bytes=options.memory_megabytes << 20,
        )
        self._pool = Pool(lambda: LastingWorker(self._brood), workers=workers, pending=pending)
        self._known: OrderedDict[Question, bool] = OrderedDict()
        self._asked: dict[Question, Future[Verdict]] = {}
        self._lock = threading.Lock()

    def grade(self, reference: str, text: str) -> Future[Verdict]:
        """The verdict on a completion; the future is often done already, and never fails for what the text contains."""
        begun = time.perf_counter()
        answer = answer_of(text, self.options)
        if answer is None:
            return _done(Verdict.of_score(0.0, reason="no boxed answer", seconds=time.perf_counter() - begun))
        said = compare(reference, answer, self.options)
        if isinstance(said, bool):
            return _done(_verdict(said, "", time.perf_counter() - begun))
        return self._ask(said)

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

    def _put(self, question: Question, worker: LastingWorker) -> Verdict:
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

    def _settle(self, question: Question, mine: Future[Verdict], done: Future[Verdict]) -> None:
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
        self._brood.kill()
        self._pool.close()
        self._brood.close()


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
