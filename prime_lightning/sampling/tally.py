"""Counts over the groups sampled for one batch: accuracy, acceptance, lengths, verdicts per source, seconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from prime_lightning.algorithms.measures import Measures
from prime_lightning.rollout import Group


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
