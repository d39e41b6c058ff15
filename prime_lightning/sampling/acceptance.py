"""Which groups are trained on, how many prompts it takes to get a batch of them, and the counts over all of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

from prime_lightning.algorithms.measures import Measures
from prime_lightning.rollout import Group


@dataclass(frozen=True, kw_only=True)
class AccuracyFilter:
    """Which groups are worth training on (PRIME, arXiv 2502.01456, section 4: accuracy between 0.2 and 0.8).

    Example:
        >>> AccuracyFilter(low=0.2, high=0.8).verdict_on([1.0, 1.0, 1.0, 1.0])
        'too_easy'
    """

    low: float = 0.2
    """Least mean outcome of a group; set 0 to keep groups without a right answer."""
    high: float = 0.8
    """Greatest mean outcome of a group; set 1 to keep groups without a wrong answer."""
    min_valid: int = 2
    """Fewest members with a verdict."""
    truncated: Literal["keep", "mask", "reject"] = "keep"
    """Responses that hit the token limit: learn from them, leave them out, or reject their group."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"Expected 0 <= low <= high <= 1 in the accuracy filter, got {self.low} and {self.high}.")
        if self.min_valid < 1:
            raise ValueError(f"Expected the accuracy filter's `min_valid` to be at least 1, got {self.min_valid}.")

    def verdict_on(self, outcomes: Sequence[float]) -> str | None:
        """Why a group with these known outcomes is rejected; None if it is accepted."""
        if len(outcomes) < self.min_valid:
            return "few_valid"
        accuracy = sum(outcomes) / len(outcomes)
        return "too_hard" if accuracy < self.low else "too_easy" if accuracy > self.high else None

    def reject(self, group: Group) -> str | None:
        """Why this group is rejected; None if it is accepted."""
        truncated = [rollout.completion.truncated for rollout in group]
        if self.truncated == "reject" and any(truncated):
            return "truncated"
        drop = [self.truncated == "mask" and cut for cut in truncated]
        kept = [rollout for rollout, out in zip(group, drop, strict=True) if rollout.verdict.known and not out]
        return self.verdict_on([rollout.verdict.score for rollout in kept])


@dataclass
class Acceptance:
    """How many prompts a batch needs, by the share of groups that the filter accepted lately.

    Example:
        >>> lately = Acceptance()
        >>> lately.prompts(8)
        8
        >>> lately.next_batch()
        >>> lately.add(accepted=1, decided=4)
        >>> lately.prompts(8)  # (0.8 + 1) of (0.8 + 4) groups
        22
    """

    MEMORY: ClassVar[float] = 0.8
    """What a batch counts for, one batch later."""
    MOST: ClassVar[int] = 10
    """Prompts for a missing group, however few are accepted."""

    accepted: float = 1.0
    decided: float = 1.0

    def next_batch(self) -> None:
        """Past batches count a little less."""
        self.accepted, self.decided = self.MEMORY * self.accepted, self.MEMORY * self.decided

    def add(self, *, accepted: int, decided: int) -> None:
        """Count the groups of a round, those that were decided in prompt order."""
        self.accepted, self.decided = self.accepted + accepted, self.decided + decided

    def prompts(self, missing: int) -> int:
        """Prompts of which about `missing` groups will be accepted."""
        return math.ceil(missing * min(self.MOST, self.decided / self.accepted))


class Tally:
    """Adds groups up and gives metrics with slashed names.

    Args:
        wanted: Accepted groups that are needed, for the progress bar.
        doing: What is going on, for the progress bar.

    Example:
        >>> tally = Tally()
        >>> tally.add([], "few_valid")
        >>> tally.measures().means()["filter/few_valid"]
        1.0
    """

    def __init__(self, wanted: int = 0, doing: str = "sample") -> None:
        self.wanted, self.doing = wanted, doing
        self.metrics: Counter[str] = Counter()
        self.groups = self.accepted = self.responses = self.known = self.tokens = self.truncated = 0
        self.score = 0.0
        self.failures: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of a block to a phase."""
        start, self.doing = time.perf_counter(), phase
        yield
        self._seconds[phase] += time.perf_counter() - start  # type: ignore[assignment]

    def add(self, group: Group, reason: str | None) -> None:
        """Count a group; `reason` says why it was rejected."""
        self.groups += 1
        self.accepted += reason is None
        if reason is not None:
            self.metrics[f"filter/{reason}"] += 1
        for rollout in group:
            self.responses += 1
            self.tokens += len(rollout.completion.token_ids)
            self.truncated += rollout.completion.truncated
            self.metrics[f"verdict/{rollout.prompt.source}/{rollout.verdict.label}"] += 1
            if rollout.verdict.known:
                self.known += 1
                self.score += rollout.verdict.score
            else:
                self.failures[rollout.verdict.reason] += 1

    @property
    def accuracy(self) -> float:
        """Mean outcome of all graded responses, before the filter."""
        return self.score / max(self.known, 1)

    def rejected(self) -> str:
        """Reasons of rejection with their counts, and what the verifier fails with most often."""
        counts = {k.removeprefix("filter/"): v for k, v in self.metrics.items() if k.startswith("filter/")}
        listed = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
        for reason, count in self.failures.most_common(1):
            listed += f"; the verifier failed {self.responses - self.known} times, {count} of them with: {reason}"
        return listed

    def measures(self) -> Measures:
        """All metrics, as sums and counts."""
        measures, seconds = Measures(), self._seconds["sample"]
        for name, total, count in (
            ("accuracy", self.score, self.known),
            ("acceptance", self.accepted, self.groups),
            ("groups", self.groups, 0),
            ("responses", self.responses, 0),
            ("tokens", self.tokens, 0),
            ("length", self.tokens, self.responses),
            ("truncated", self.truncated, self.responses),
            ("unknown", self.responses - self.known, self.responses),
            ("tokens_per_second", self.tokens / seconds if seconds else 0.0, 0),
        ):
            measures.add(f"rollout/{name}", total, count)
        for phase, spent in self._seconds.items():
            measures.total(f"time/{phase}", spent)
        for name, number in self.metrics.items():
            measures.add(name, number, 0)
        return measures
