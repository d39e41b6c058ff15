"""Are the references of a data set usable: checked once, when it is loaded, with the graders that will use them.

Usable is a reference that a model could meet by writing the answer it stands for. That a text equals itself says
little: a whole solution does so, too, and no answer equals it.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from prime_lightning.rollout import Label, Verdict
from prime_lightning.verifiers.maths.answer import MathGrader
from prime_lightning.verifiers.references import BOXED, boxed, complaint


@dataclass(frozen=True, slots=True, kw_only=True)
class BadReference:
    """A reference that cannot be graded against."""

    row: int
    """Its position among the prompts that were checked."""
    source: str
    """Its data set."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceReport:
    """The outcome of `Verifiers.check_references`.

    Example:
        >>> report = ReferenceReport(checked=3, bad=[BadReference(row=1, source="sums", reason="empty")])
        >>> report.usable, str(report)
        ([0, 2], '1 of 3 references cannot be used and their rows are dropped: sums row 1 (empty)')
    """

    checked: int
    """How many prompts."""
    bad: list[BadReference] = field(default_factory=list)
    """In the order of their rows."""

    @property
    def usable(self) -> list[int]:
        """Positions of the prompts to keep."""
        dropped = {bad.row for bad in self.bad}
        return [row for row in range(self.checked) if row not in dropped]

    def __str__(self) -> str:
        if not self.bad:
            return f"all {self.checked} references agree with themselves"
        listed = ", ".join(f"{bad.source or 'unnamed'} row {bad.row} ({bad.reason})" for bad in self.bad[:20])
        more = f" and {len(self.bad) - 20} more" if len(self.bad) > 20 else ""
        return f"{len(self.bad)} of {self.checked} references cannot be used and their rows are dropped: {listed}{more}"


def of_maths(grader: MathGrader, reference: str) -> Future[str]:
    """Why no answer could be graded as right against a reference; empty if one could."""
    reason, inside = complaint(reference), boxed(reference)
    if reason:
        found: Future[str] = Future()
        found.set_result(reason)
        return found
    if not inside:
        return grader.check(reference)
    met: Future[str] = Future()
    graded = grader.grade(reference, rf"\boxed{{{inside}}}")
    graded.add_done_callback(lambda done: met.set_result(_unmet(done.result())))
    return met


def _unmet(verdict: Verdict) -> str:
    return f"not what stands in its box; {BOXED}" if verdict.label is Label.WRONG else ""
