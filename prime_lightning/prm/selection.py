"""What best-of-n and voting come to on average over all sets of n out of N samples of a problem.

The average over sets has a closed form for the best by a score; for votes it is taken over all sets
where they are few, and over seeded random ones where they are many.

Shapes: N samples of a problem, S sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from math import comb

import numpy as np

RULES = {
    "sum": lambda steps: float(np.sum(steps)),
    "mean": lambda steps: float(np.mean(steps)),
    "min": lambda steps: float(np.min(steps)),
    "last": lambda steps: float(steps[-1]),
}
"""The score of a response from the rewards of its steps. ImplicitPRM (arXiv 2412.01981) ranks by `min`."""


def best_of_n(score_N: np.ndarray, outcome_N: np.ndarray, n: int) -> float:
    """Mean outcome of the best by score in a set of n; samples of equal score share.

    `sum_b mean_{i in b} o_i * [C(N - s_b, n) - C(N - s_b - |b|, n)] / C(N, n)` over the blocks b of equal scores,
    `s_b` the number of samples with a greater score: the chance that the set's best is in b.

    Example:
        >>> best_of_n(np.array([0.3, 0.2, 0.1]), np.array([0.0, 1.0, 0.0]), 2)  # best of {2, 3} only
        0.3333333333333333
    """
    total, above, size = 0.0, 0, len(score_N)
    for value in np.unique(score_N)[::-1]:
        block = score_N == value
        chance = (comb(size - above, n) - comb(size - above - int(block.sum()), n)) / comb(size, n)
        total += chance * float(outcome_N[block].mean())
        above += int(block.sum())
    return total


def sets_of(size: int, n: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    """`[S, N]` bool, one set of n samples a row: all sets if they are at most `limit`, else `limit` random ones.

    Example:
        >>> sets_of(3, 2, 10, np.random.default_rng(0)).astype(int).tolist()
        [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    """
    if comb(size, n) <= limit:
        members = np.array(list(itertools.combinations(range(size), n)))
    else:
        members = rng.random((limit, size)).argsort(1)[:, :n]
    sets_SN = np.zeros((len(members), size), bool)
    np.put_along_axis(sets_SN, members, True, 1)
    return sets_SN


def vote(answers: Sequence[Hashable | None], weight_N: np.ndarray, outcome_N: np.ndarray, sets_SN: np.ndarray) -> float:
    """Mean outcome of the answer with the greatest sum of weights in each set; equal sums share.

    Weights of 1 are the majority vote. A sample without an answer (None) does not vote; a set without any vote is 0.

    Example:
        >>> answers, outcome_N = ["4", "5", "5"], np.array([1.0, 0.0, 0.0])
        >>> vote(answers, np.ones(3), outcome_N, np.array([[True, True, True], [True, True, False]]))  # 0 and a tie
        0.25
    """
    names = sorted({a for a in answers if a is not None}, key=repr)
    if not names:
        return 0.0
    same_NC = np.array([[a == name for name in names] for a in answers])
    count_SC = sets_SN.astype(float) @ same_NC
    weight_SC = np.where(count_SC > 0, sets_SN.astype(float) @ (weight_N[:, None] * same_NC), -np.inf)
    outcome_SC = sets_SN.astype(float) @ (outcome_N[:, None] * same_NC) / np.maximum(count_SC, 1)
    best_SC = np.isclose(weight_SC, weight_SC.max(1, keepdims=True), rtol=1e-9, atol=0) & (count_SC > 0)
    return float(((best_SC * outcome_SC).sum(1) / np.maximum(best_SC.sum(1), 1)).mean())
