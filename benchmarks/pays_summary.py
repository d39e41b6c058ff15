"""What the cells of benchmarks/pays.py say: rollouts to thresholds, and ratios of two methods paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
"""Two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom."""
Curve = Sequence[tuple[float, float]]
"""Rollouts of each iteration, and the share of them that is right."""


def smoothed(curve: Curve, window: float) -> list[tuple[float, float]]:
    """Rollouts so far, at the middle of each window of rollouts, and the share that is right in it.

    A window is so many iterations, an odd number, as come nearest to `window` rollouts, so that methods with small and
    with large batches are smoothed alike.

    Example:
        >>> smoothed([(10, 0.0), (10, 0.3), (10, 0.6)], window=30)
        [(20.0, 0.3)]
    """
    if not curve:
        return []
    mean = sum(n for n, _ in curve) / len(curve)
    half = max(0, round((window / mean - 1) / 2))
    ends, total = [], 0.0
    for n, _ in curve:
        total += n
        ends.append(total)
    found = []
    for i in range(half, len(curve) - half):
        part = curve[i - half : i + half + 1]
        found.append((ends[i], sum(n * share for n, share in part) / sum(n for n, _ in part)))
    return found


def reached(curve: Curve, threshold: float, window: float) -> float | None:
    """Rollouts until the smoothed share first reaches a threshold; None if it never does."""
    return next((rollouts for rollouts, share in smoothed(curve, window) if share >= threshold), None)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the 95 % interval of Student's t; the interval of one value is everything.

    Example:
        >>> [round(x, 2) for x in interval([1.0, 2.0, 3.0])]
        [2.0, -0.48, 4.48]
    """
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, -math.inf, math.inf
    half = T95[min(n - 1, len(T95)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def ratio(pairs: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Geometric mean of `a / b` over pairs, with its 95 % interval.

    Example:
        >>> [round(x, 2) for x in ratio([(2.0, 1.0), (8.0, 4.0)])]
        [2.0, 2.0, 2.0]
    """
    mean, low, high = interval([math.log(a / b) for a, b in pairs])
    return math.exp(mean), math.exp(low) if low > -math.inf else 0.0, math.exp(high) if high < 700 else math.inf


def rollouts_to(cell: dict[str, Any], threshold: float) -> float:
    """Rollouts to a threshold; the cell's budget, where that was not enough."""
    found = reached(cell["curve"], threshold, cell["window"])
    return float(cell["budget"]) if found is None else found


def paired(cells: Sequence[dict[str, Any]], a: str, b: str, thresholds: Sequence[float]) -> list[list[float]]:
    """Of each seed that both methods have: the ratios of rollouts to each threshold, a over b."""
    by = {(cell["method"], cell["seed"]): cell for cell in cells}
    seeds = sorted(seed for method, seed in by if method == a and (b, seed) in by)
    return [[rollouts_to(by[a, s], t) / rollouts_to(by[b, s], t) for t in thresholds] for s in seeds]


def rows(cells: Sequence[dict[str, Any]], thresholds: Sequence[float]) -> Iterable[str]:
    """A line of a table for each method of one task."""
    for method in dict.fromkeys(cell["method"] for cell in cells):
        mine = [cell for cell in cells if cell["method"] == method]
        columns = []
        for t in thresholds:
            never = sum(reached(cell["curve"], t, cell["window"]) is None for cell in mine)
            mean = statistics.fmean(rollouts_to(cell, t) for cell in mine)
            columns.append(f"{mean:.0f}" + (f" ({never} never)" if never else ""))
        aucs = [a for cell in mine for a in cell["step_auc"][len(cell["step_auc"]) // 2 :] if a is not None]
        shares = [sum(n * s for n, s in c["curve"]) / sum(n for n, _ in c["curve"]) for c in mine]
        ends = [statistics.fmean(c[name] for c in mine) for name in ("pass1_before", "pass1_after")]
        spent = [statistics.fmean(c[name] for c in mine) for name in ("tokens", "cpu_seconds")]
        yield (
            f"| {method} | {len(mine)} | {ends[0]:.3f} | "
            + " | ".join(columns)
            + f" | {statistics.fmean(shares):.3f} | {ends[1]:.3f} | "
            + (f"{statistics.fmean(aucs):.3f}" if aucs else "-")
            + f" | {spent[0]:.0f} | {spent[1]:.0f} |"
        )


def summary(cells: Sequence[dict[str, Any]], thresholds: Sequence[float], baseline: str = "rloo") -> str:
    """Markdown: one table a task, and how many times fewer rollouts each method needs than the baseline."""
    parts = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        mine = [cell for cell in cells if cell["task"] == task]
        heads = " | ".join(f"to {t:g}" for t in thresholds)
        parts += [
            f"## Task {task}",
            "",
            f"| method | seeds | start | {heads} | mean | pass@1 | step AUC | tokens | CPU s |",
            "|" + "---|" * (8 + len(thresholds)),
            *rows(mine, thresholds),
            "",
            f"Rollouts of {baseline} over those of each method, paired by seed (geometric mean, 95 % interval):",
            "",
        ]
        for method in dict.fromkeys(cell["method"] for cell in mine if cell["method"] != baseline):
            parts += ratio_line(method, paired(mine, baseline, method, thresholds), thresholds)
        parts.append("")
    return "\n".join(parts)


def ratio_line(method: str, ratios: list[list[float]], thresholds: Sequence[float]) -> list[str]:
    """One line a method: the mean over all thresholds, then each of them."""
    if not ratios:
        return [f"- {method}: no seed in common"]
    whole = ratio((math.exp(statistics.fmean(map(math.log, one))), 1.0) for one in ratios)
    single = [ratio((one[i], 1.0) for one in ratios) for i in range(len(thresholds))]
    each = ", ".join(
        f"to {t:g} {m:.2f} ({low:.2f} to {high:.2f})" for t, (m, low, high) in zip(thresholds, single, strict=True)
    )
    mean, low, high = whole
    return [f"- {method}: **{mean:.2f}** ({low:.2f} to {high:.2f}); {each}; {len(ratios)} seeds"]
