"""Find the first wrong step with step scores: predictions, F1 and the threshold (ProcessBench, arXiv 2412.06559).

A response's first step with a score below the threshold is predicted to be its first error; -1 if there is none.
F1 is the harmonic mean of two accuracies: on responses with an error, whose very step must be found, and on those
without.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prime_lightning.evaluation.statistics import bootstrap


def predict(scores: Sequence[float], threshold: float) -> int:
    """Number of the first step that scores below the threshold, from 0; -1 if there is none.

    Example:
        >>> predict([0.2, -0.3, -0.5], 0.0), predict([0.2, -0.3, -0.5], -1.0)
        (1, -1)
    """
    return next((i for i, score in enumerate(scores) if score < threshold), -1)


def f1(scores: Sequence[Sequence[float]], labels: Sequence[int], threshold: float) -> dict[str, float]:
    """Accuracy on responses with an error (label >= 0), on those without (label -1), and their harmonic mean.

    Raises:
        ValueError: if one of the two kinds is missing.

    Example:
        >>> f1([[0.2, -0.3], [-0.1], [0.4]], [1, -1, -1], 0.0)
        {'error': 1.0, 'correct': 0.5, 'f1': 0.6666666666666666}
    """
    error, correct = (float(hits.mean()) for hits in _hits(scores, labels, threshold))
    return {"error": error, "correct": correct, "f1": _harmonic(error, correct)}


def f1_interval(
    scores: Sequence[Sequence[float]], labels: Sequence[int], threshold: float, *, seed: int
) -> tuple[float, float]:
    """95 % interval of F1 by `bootstrap`, responses with and without an error drawn apart; the threshold stays."""
    kinds = _hits(scores, labels, threshold)
    return bootstrap(lambda error, correct: _harmonic(error.mean(), correct.mean()), *kinds, seed=seed)


def _hits(scores: Sequence[Sequence[float]], labels: Sequence[int], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether each response with an error, and each one without, is predicted rightly."""
    hits = np.array([predict(s, threshold) == label for s, label in zip(scores, labels, strict=True)])
    has_error = np.array(labels) >= 0
    _both_kinds(has_error)
    return hits[has_error], hits[~has_error]


def best_threshold(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The threshold with the greatest F1 on these responses, in the middle of the range that gives it.

    A response with its first error at step e is hit by thresholds in `(s_e, min_{i<e} s_i]`, one without by those up
    to `min_i s_i`; so counting the ends of these ranges gives F1 at every threshold. Choose it on responses that are
    not scored: on the scored ones it flatters.

    Raises:
        ValueError: if responses with an error, or without one, are missing.

    Example:
        >>> round(best_threshold([[0.2, -0.3], [-0.1], [0.4]], [1, -1, -1]), 6)  # between -0.3 and -0.1
        -0.2
    """
    has_error = np.array(labels) >= 0
    _both_kinds(has_error)
    low = np.array([s[e] if e >= 0 else -np.inf for s, e in zip(scores, labels, strict=True)])
    high = np.array([min(s[:e] if e >= 0 else s, default=np.inf) for s, e in zip(scores, labels, strict=True)])
    ends = np.unique(np.concatenate([np.concatenate([np.array(s) for s in scores]), [np.inf]]))
    beyond = ends[-2] + 1.0 if len(ends) > 1 else 1.0
    # Thresholds in (ends[k-1], ends[k]] predict the same; take ends[k] for all of them.
    error, correct = (_hit_rate(low[kind], high[kind], ends) for kind in (has_error, ~has_error))
    values = np.array([_harmonic(e, c) for e, c in zip(error, correct, strict=True)])
    k = int(values.argmax())
    upper = min(float(ends[k]), beyond)
    return upper if k == 0 else (float(ends[k - 1]) + upper) / 2


def _hit_rate(low: np.ndarray, high: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of the ranges `(low, high]` that hold each threshold; ranges that are empty hold none."""
    real = low < high
    inside = np.searchsorted(np.sort(low[real]), thresholds, "left") - np.searchsorted(
        np.sort(high[real]), thresholds, "left"
    )
    return np.asarray(inside / len(low))


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def _both_kinds(has_error: np.ndarray) -> None:
    if has_error.all() or not has_error.any():
        raise ValueError(
            "Expected responses with an error (label >= 0) and without one (label -1), got "
            f"{int(has_error.sum())} and {int((~has_error).sum())}."
        )
