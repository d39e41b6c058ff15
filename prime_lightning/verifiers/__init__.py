"""Graders of completions: correct, wrong, partial, or unknown where we failed.

`Verifiers` is the front. Behind it: `exact` in the caller's thread, `math` and `code` in sandboxed workers, a user's
function in a worker of its own, a remote grader over HTTP. What is protected and what is not stands at the top of
`workers/sandbox.py` and in docs/verifiers.md.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import replace
from typing import Any

from prime_lightning.rollout import Prompt, Verdict
from prime_lightning.verifiers.code.answer import CodeGrader, SandboxLeaks
from prime_lightning.verifiers.maths.answer import MathGrader, answer_of
from prime_lightning.verifiers.maths.text import normalise
from prime_lightning.verifiers.options import CodeOptions, MathOptions, UserOptions
from prime_lightning.verifiers.references import BadReference, ReferenceReport, of_maths
from prime_lightning.verifiers.remote import HttpVerifier, RemoteGrader
from prime_lightning.verifiers.user_answer import UserGrader
from prime_lightning.verifiers.workers.pool import WorkerDied

__all__ = [
    "VOTING",
    "BadReference",
    "CodeOptions",
    "HttpVerifier",
    "MathOptions",
    "ReferenceReport",
    "SandboxLeaks",
    "UserOptions",
    "Verifiers",
    "final_answer",
    "verify",
]

Grader = MathGrader | CodeGrader | UserGrader | RemoteGrader
_MATH, _CODE, _USER = MathOptions(), CodeOptions(), UserOptions()
VOTING = ("exact", "math")
"""Kinds whose completions have a final answer to vote for."""


def exact(prompt: Prompt, text: str) -> Verdict:
    """The text after the last `#`, stripped, must be the reference answer.

    Example:
        >>> exact(Prompt(draw=0, token_ids=(), text="1+1=", kind="exact", answer="2"), "1+1=2 # 2").score
        1.0
    """
    _, marker, answer = text.rpartition("#")
    if not marker:
        return Verdict.of_score(0.0, reason="no # marker")
    return Verdict.of_score(float(answer.strip() == prompt.answer.strip()), reason="compared exactly")


def final_answer(text: str, kind: str, answer: str = "boxed") -> str | None:
    r"""What a completion votes for, in one way of writing; None where it commits itself to nothing.

    Only the kinds of `VOTING` have final answers that can be compared. `answer` is that of `MathOptions`; what only
    `anywhere` finds has no vote.

    Example:
        >>> final_answer("7;4;#4", "exact"), final_answer(r"so $\boxed{\dfrac12}$", "math"), final_answer("4", "math")
        ('4', '\\frac{1}{2}', None)
    """
    if kind == "exact":
        return text.rpartition("#")[2].strip() if "#" in text else None
    found = answer_of(text, replace(_MATH, answer=answer)) if kind == "math" else None
    return None if found is None else normalise(found)


class Verifiers:
    r"""Grades completions: a front that dispatches on a prompt's kind, over pools of killable workers, started lazily.

    Usable from any thread and, by `asyncio.wrap_future`, from a coroutine; picklable (the copy starts workers of its
    own).

    Args:
        workers: Worker processes of each kind in use.
        math: What counts as the same answer.
        code: How programs are run.
        user: How functions named by import path are run.
        remotes: Graders over HTTP, by the kind that prompts name.
        allow_unsafe_sandbox: Run programs even where the self-test of the sandbox finds a leak.
        pending: Completions that may wait per kind before `submit` blocks.

    Example:
        >>> prompt = Prompt(draw=0, token_ids=(), text="1/4+1/4=", kind="math", answer="0.5")
        >>> with Verifiers() as verifiers:
        ...     verifiers.verify(prompt, r"It is \boxed{\frac{1}{2}}.").label.value
        'correct'
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        math: MathOptions = _MATH,
        code: CodeOptions = _CODE,
        user: UserOptions = _USER,
        remotes: Mapping[str, HttpVerifier] | None = None,
        allow_unsafe_sandbox: bool = False,
        pending: int = 1024,
    ) -> None:
        if workers < 1 or pending < 1:
            raise ValueError(f"Expected `workers` and `pending` of at least 1, got {workers} and {pending}.")
        self._settings: dict[str, Any] = {
            "workers": workers,
            "math": math,
            "code": code,
            "user": user,
            "remotes": dict(remotes or {}),
            "allow_unsafe_sandbox": allow_unsafe_sandbox,
            "pending": pending,
        }
        self._reset()

    def _reset(self) -> None:
        self._graders: dict[str, Grader] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        # Closes at garbage collection and at interpreter exit, whichever comes first.
        self._finalizer = weakref.finalize(self, _close_all, self._graders)

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        Verifiers.__init__(self, **settings)

    def answering(self, place: str) -> Verifiers:
        """The same, but for where the answers of maths stand (`MathOptions.answer`); itself where nothing changes."""
        math = self._settings["math"]
        return self if math.answer == place else Verifiers(**{**self._settings, "math": replace(math, answer=place)})

    def submit(self, prompt: Prompt, text: str) -> Future[Verdict]:
        """Grade a completion in the background; never raises for what it contains.

        Blocks while `pending` completions of this kind wait.

        Raises:
            ValueError: The prompt's kind is none that we have.
            RuntimeError: `close` was called.
        """
        inner = self._grade(prompt, text)
        outer: Future[Verdict] = Future()
        inner.add_done_callback(lambda done: self._pass_on(prompt, done, outer))
        return outer

    def _grade(self, prompt: Prompt, text: str) -> Future[Verdict]:
        if prompt.kind == "exact":
            done: Future[Verdict] = Future()
            done.set_result(exact(prompt, text))
            return done
        grader = self._grader(prompt.kind)
        return grader.grade(prompt.answer, text) if isinstance(grader, MathGrader) else grader.grade(prompt, text)

    def _grader(self, kind: str) -> Grader:
        if os.getpid() != self._process:  # forked: the workers are the parent's
            self._finalizer.detach()
            self._reset()
        with self._lock:
            if self._closed:
                raise RuntimeError("These verifiers are closed.")
            if kind not in self._graders:
                self._graders[kind] = self._make(kind)
            return self._graders[kind]

    def _make(self, kind: str) -> Grader:
        settings = self._settings
        size = {"workers": settings["workers"], "pending": settings["pending"]}
        if kind in settings["remotes"]:
            return RemoteGrader(settings["remotes"][kind], pending=settings["pending"])
        if kind == "math":
            return MathGrader(settings["math"], **size)
        if kind == "code":
            return CodeGrader(settings["code"], allow_unsafe_sandbox=settings["allow_unsafe_sandbox"], **size)
        if "." in kind and all(part.isidentifier() for part in kind.split(".")):
            return UserGrader(kind, settings["user"], **size)
        raise ValueError(
            f"Expected a prompt's kind to be `exact`, `math`, `code`, one of the remotes {sorted(settings['remotes'])}"
            f" or the import path of a function, got {kind!r}."
        )

    def _pass_on(self, prompt: Prompt, done: Future[Verdict], outer: Future[Verdict]) -> None:
        try:
            verdict = done.result()
        except CancelledError:
            verdict = Verdict.unknown("the verifiers were closed")
        except WorkerDied as error:
            verdict = Verdict.unknown(f"no worker: {error}")
        except BaseException as error:
            with contextlib.suppress(InvalidStateError):
                outer.set_exception(error)
            return
        with contextlib.suppress(InvalidStateError):  # the caller has cancelled it
            outer.set_result(verdict)

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Grade a completion and wait for the verdict."""
        return self.submit(prompt, text).result()

    def map(self, pairs: Iterable[tuple[Prompt, str]], *, ahead: int = 256) -> Iterator[Verdict]:
        """Verdicts in the order of `pairs`, which is read at most `ahead` entries further than what was yielded."""
        waiting: deque[Future[Verdict]] = deque()
        for prompt, text in pairs:
            waiting.append(self.submit(prompt, text))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def check_references(self, prompts: Iterable[Prompt]) -> ReferenceReport:
        """Check of every reference that an answer could be graded as right against it.

        Maths is read for what is no answer, then checked by the workers that will compare it; code by running the
        reference solution.
        Kinds that we do not grade ourselves are taken as they are. A failure of ours is no fault of a reference.
        """
        waiting: list[tuple[int, str, Future[str]]] = []
        bad: list[BadReference] = []
        checked = 0
        for row, prompt in enumerate(prompts):
            checked += 1
            if prompt.kind == "exact":
                if not prompt.answer.strip() or "#" in prompt.answer:
                    bad.append(BadReference(row=row, source=prompt.source, reason="empty, or with a # in it"))
                continue
            grader = self._grader(prompt.kind)
            if isinstance(grader, MathGrader):
                waiting.append((row, prompt.source, of_maths(grader, prompt.answer)))
            elif isinstance(grader, CodeGrader):
                waiting.append((row, prompt.source, grader.check(prompt)))
        for row, source, found in waiting:
            reason = found.result()
            if reason:
                bad.append(BadReference(row=row, source=source, reason=reason))
        return ReferenceReport(checked=checked, bad=sorted(bad, key=lambda one: one.row))

    def close(self) -> None:
        """End all workers; what still runs becomes unknown. Idempotent; no process, descriptor or file is left."""
        with self._lock:
            self._closed = True
        if os.getpid() == self._process:
            self._finalizer()

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_all(graders: dict[str, Grader]) -> None:
    for grader in graders.values():
        grader.close()
    graders.clear()


_shared: list[Verifiers] = []
_shared_lock = threading.Lock()


def verify(prompt: Prompt, text: str) -> Verdict:
    """Grade one completion with default settings; the workers stay for the next call and end with the interpreter."""
    with _shared_lock:
        if not _shared:
            _shared.append(Verifiers())
    return _shared[0].verify(prompt, text)
