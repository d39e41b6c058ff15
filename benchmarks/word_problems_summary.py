"""What the stages of benchmarks/word_problems.py say, as tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prime_lightning.evaluation.statistics import Z95, mean_and_error

Stage = Mapping[str, Any]


def summary(stages: Sequence[Stage]) -> str:
    """All tables; of a stage that was run with several settings, the last."""
    parts = [accuracies(of(stages, "eval")), runs(of(stages, "rl")), credits_of(of(stages, "credit"))]
    return "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines)


def of(stages: Sequence[Stage], which: str) -> list[Stage]:
    """The last of each model, or of each method and seed, of a kind of stage."""
    names = ("model", "method", "seed")
    return list({tuple(one.get(name) for name in names): one for one in stages if one["stage"] == which}.values())


def accuracies(stages: Sequence[Stage]) -> Iterator[str]:
    """Accuracy of each model with its interval, what is gained on the warm start, and it by numbers in the problem."""
    if not stages:
        return
    base = next((one for one in stages if one["model"] == "warm"), None)
    title, parts = (
        stages[0]["result"]["title"],
        list(dict.fromkeys(name for one in stages for name in one.get("parts", ()))),
    )
    yield f"| model | {title}, greedy | problems | points above the warm start | {' | '.join(parts)} |"
    yield "|---" * (4 + len(parts)) + "|"
    for one in stages:
        result = one["result"]
        value, (low, high) = result["metrics"]["accuracy"], result["interval"]["accuracy"]
        known = base is not None and "right" in base and "right" in one and one["model"] not in ("untrained", "warm")
        gain = gained(base["right"], one["right"]) if base and known else ""
        shares = " | ".join(f"{one['parts'][name]:.1%}" if "parts" in one else "" for name in parts)
        yield f"| {one['model']} | {value:.1%} ({low:.1%} to {high:.1%}) | {result['problems']} | {gain} | {shares} |"


def gained(before: Sequence[float], after: Sequence[float]) -> str:
    """Points of accuracy on the same problems, and the 95 % interval of the mean difference.

    Example:
        >>> gained([0, 0, 1, 0], [1, 0, 1, 1])
        '+50.0 (-6.6 to +106.6)'
    """
    mean, error = mean_and_error([b - a for a, b in zip(before, after, strict=True)])
    low, high = (100 * (mean + side * Z95 * error) for side in (-1, 1))
    return f"{100 * mean:+.1f} ({low:+.1f} to {high:+.1f})"


def runs(stages: Sequence[Stage]) -> Iterator[str]:
    """Training accuracy of each run and what its PRM knew and weighed, in fifths, and what it cost."""
    if not stages:
        return
    measured = "accuracy while training, by fifths | the PRM ranks right above wrong | what is paid does"
    yield f"| run | {measured} | its share of the advantages | rollouts | tokens | seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in stages:
        curve = one["curve"]
        names = ("rollout/accuracy", "prm/accuracy", "process/accuracy", "process/advantage_share")
        shares = " | ".join(", ".join(f"{value:.1%}" for value in fifths(curve.get(name, ()))) for name in names)
        counts = f"{sum(curve['rollout/responses']):,.0f} | {sum(curve['rollout/tokens']):,.0f}"
        yield f"| {one['method']}, seed {one['seed']} | {shares} | {counts} | {one['seconds']:,.0f} |"


def fifths(values: Sequence[float]) -> list[float]:
    """Means of five stretches of about equal length.

    Example:
        >>> fifths([1.0, 3.0, 5.0, 5.0, 5.0, 5.0, 0.0, 0.0, 7.0, 9.0])
        [2.0, 5.0, 5.0, 0.0, 8.0]
    """
    ends = [round(i * len(values) / 5) for i in range(6)]
    return [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(ends) if b > a]


def credits_of(stages: Sequence[Stage]) -> Iterator[str]:
    """Step AUC of each PRM, and how often the first wrong word has less than the mean of those before it."""
    if not stages:
        return
    yield "| PRM of | answers | wrong ones | AUC of answers | of words, wrong answers | falls |"
    yield "|---|---|---|---|---|---|"
    for one in stages:
        falls = one["falls"]
        share = "" if falls["share"] is None else f"{falls['share']:.0%} of {falls['of']}"
        aucs = " | ".join(said(one[name]) for name in ("whole", "words_of_wrong"))
        counts = f"{one['answers']} | {one['wrong_answers']}"
        yield f"| {one['method']}, seed {one['seed']} | {counts} | {aucs} | {share} |"


def said(measured: Mapping[str, Any]) -> str:
    """An AUC with its interval."""
    if measured["auc"] is None:
        return "none"
    low, high = measured["interval"]
    return f"{measured['auc']:.3f} ({low:.3f} to {high:.3f})"
