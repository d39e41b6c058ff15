"""The numbers of a benchmark: pass@k, majority vote, standard errors and intervals, as functions of numbers.

Shapes: P problems, K samples of one problem.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def pass_at_k(correct: int, samples: int, k: int) -> float:
    r"""Unbiased estimate of the probability that one of k samples is right (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    `pass@k = 1 - C(n - c, k) / C(n, k)` for c right ones of n samples: the share of all choices of k samples that
    hold a right one.

    Args:
        correct: Right samples, c.
        samples: All samples, n.
        k: Draws.

    Raises:
        ValueError: if not 0 <= c <= n or not 1 <= k <= n.

    Example:
        >>> pass_at_k(correct=1, samples=4, k=2)
        0.5
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"Expected 0 <= correct <= samples and 1 <= k <= samples, got {correct=}, {samples=}, {k=}.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Probability that a vote of all samples gives a right answer (self-consistency, Wang et al., arXiv 2203.11171).

    Right answers count as one candidate however they are written, wrong ones by their text; samples without an answer
    do not vote; a tie is decided by lot.

    Args:
        answers: `[K]` answer of each sample, None where there is none.
        right: `[K]` whether it was graded right.

    Example:
        >>> majority(["1/2", "0.5", "3", "3", None], [True, True, False, False, False])
        0.5
    """
    votes: Counter[str | None] = Counter()
    for answer, is_right in zip(answers, right, strict=True):
        if is_right or answer is not None:
            votes[None if is_right else answer] += 1
    top = max(votes.values(), default=0)
    leaders = [answer for answer, count in votes.items() if count == top]
    return (None in leaders) / len(leaders) if leaders else 0.0


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over problems and its standard error, `sd / sqrt(P)`; the samples of one problem are one observation.

    Values that are NaN (nothing known of the problem) are left out; without any value both are NaN.

    Example:
        >>> mean_and_error([0.0, 1.0, 1.0, 0.0])
        (0.5, 0.28867513459481287)
    """
    known = [value for value in values if not math.isnan(value)]
    n = len(known)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(known) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1) / n)


def wilson(mean: float, error: float, problems: int, samples: int = 1) -> tuple[float, float]:
    """95 % Wilson score interval of a mean of values in [0, 1], for the effective number of observations.

    With `n_eff = m (1 - m) / error^2`, between P and P * K (Korn and Graubard 1998 use it for clustered surveys).
    For K = 1 it is the ordinary Wilson interval; it has a width at 0 % and 100 %, where a standard error has none.

    Args:
        mean: Of the problems' values.
        error: Its standard error.
        problems: P.
        samples: K.

    Example:
        >>> low, high = wilson(0.0, 0.0, problems=30)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.114)
    """
    if problems == 0 or math.isnan(mean):
        return math.nan, math.nan
    spread = mean * (1 - mean)
    known = error > 0 and spread > 0
    n = min(max(spread / error / error, problems), problems * samples) if known else float(problems)
    centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(spread / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    statistic: Callable[..., float], *groups: np.ndarray, seed: int, resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic; the same seed draws the same observations.

    Take `wilson` for a share of right answers: it has a width where all observations are equal.

    Args:
        statistic: Of as many arrays as there are groups; NaN where it has no value, which does not count.
        groups: Observations of each kind, which are drawn with replacement, apart from those of other kinds.
        seed: Of what is drawn.
        resamples: How often.

    Example:
        >>> bootstrap(np.mean, np.ones(5), seed=0)
        (1.0, 1.0)
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(*(g[rng.integers(0, len(g), len(g))] for g in groups)) for _ in range(resamples)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... up to and including the number of samples.

    Example:
        >>> powers_of_two(10)
        [1, 2, 4, 8, 10]
    """
    return sorted({*(2**i for i in range(samples.bit_length()) if 2**i <= samples), samples})
