"""How many verdicts of each class every data source got, and the alarm when our own failures become many."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from prime_lightning.rollout import Label, Verdict

_log = logging.getLogger(__name__)
_ALARM_SHARE, _ALARM_AFTER = 0.01, 100


class VerdictCounts:
    """Counts of verdicts per source. Thread-safe.

    Example:
        >>> counts = VerdictCounts()
        >>> counts.add("sums", Verdict.of_score(1.0, reason="equal"))
        >>> counts.metrics()["verdicts/sums/correct"], counts.unknown_share()
        (1, 0.0)
    """

    def __init__(self) -> None:
        self._labels: Counter[tuple[str, Label]] = Counter()
        self._reasons: Counter[tuple[str, str]] = Counter()
        self._alarmed_at = 0
        self._lock = threading.Lock()

    def add(self, source: str, verdict: Verdict) -> None:
        """Count one verdict; warn each time that unknown ones stay above 1 % while their number doubles."""
        with self._lock:
            self._labels[source, verdict.label] += 1
            self._reasons[source, verdict.reason.partition(":")[0]] += 1
            if verdict.known:
                return
            unknown = sum(count for (_, label), count in self._labels.items() if label is Label.UNKNOWN)
            total = sum(self._labels.values())
            alarm = total >= _ALARM_AFTER and unknown > _ALARM_SHARE * total and unknown >= 2 * self._alarmed_at
            if alarm:
                self._alarmed_at = unknown
        if alarm:
            _log.warning(
                "%d of %d verdicts are unknown (more than 1 %%): the verifiers fail, the last one of `%s`: %s",
                unknown, total, source, verdict.reason,
            )  # fmt: skip

    def unknown_share(self) -> float:
        """Unknown verdicts among all, in [0, 1]."""
        with self._lock:
            total = sum(self._labels.values())
            return sum(n for (_, label), n in self._labels.items() if label is Label.UNKNOWN) / total if total else 0.0

    def metrics(self) -> dict[str, float]:
        """`verdicts/<source>/<class>` counts since the start, for a logger."""
        with self._lock:
            sources = {source for source, _ in self._labels}
            return {
                f"verdicts/{source or 'unnamed'}/{label}": self._labels[source, label]
                for source in sources
                for label in Label
            }

    def reasons(self) -> dict[str, dict[str, int]]:
        """Source -> reason -> count; a rise of `bad frame` or `too much output` shows a hack being learnt."""
        with self._lock:
            table: dict[str, dict[str, int]] = {}
            for (source, reason), count in self._reasons.most_common():
                table.setdefault(source, {})[reason] = count
            return table
