"""pass@k, majority vote, errors and intervals against slow references."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.evaluation.statistics import (
    Z95,
    bootstrap,
    majority,
    mean_and_error,
    pass_at_k,
    powers_of_two,
    wilson,
)


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in range(1, 8) for k in range(1, n + 1)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_sample(n, k):
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        choices = list(itertools.combinations(right, k))
        assert pass_at_k(c, n, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_unbiased():
    """Its expectation over binomial counts is the probability itself, 1 - (1 - p)^k, for any n >= k."""
    p, n, k = 0.3, 9, 4
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(c, n, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize("wrong", [(-1, 4, 1), (5, 4, 1), (1, 4, 5), (1, 4, 0)])
def test_pass_at_k_refuses_nonsense(wrong):
    with pytest.raises(ValueError, match="Expected 0 <= correct <= samples"):
        pass_at_k(*wrong)


@given(st.lists(st.sampled_from(["right", "r", "a", "b", None]), max_size=6))
def test_majority_is_the_mean_over_all_ways_to_break_a_tie(drawn):
    """Reference: shuffle the votes in every order; the first answer that reaches the top count wins."""
    right = [answer in ("right", "r") for answer in drawn]
    votes = ["right" if ok else answer for answer, ok in zip(drawn, right, strict=True) if ok or answer is not None]
    candidates = sorted(set(votes))
    top = max(map(votes.count, candidates), default=0)
    orders = list(itertools.permutations(candidates))
    wins = [next(c for c in order if votes.count(c) == top) == "right" for order in orders if order]
    assert majority(drawn, right) == pytest.approx(sum(wins) / len(wins) if wins else 0.0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_mean_and_error_are_numpys(values):
    mean, error = mean_and_error([*values, math.nan])
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-12)


def test_mean_of_nothing_and_of_one():
    assert all(map(math.isnan, mean_and_error([math.nan])))
    mean, error = mean_and_error([1.0])
    assert mean == 1.0
    assert math.isnan(error)


@pytest.mark.parametrize(("right", "n"), [(0, 30), (1, 30), (8, 30), (30, 30), (250, 500)])
def test_interval_of_single_samples_solves_wilsons_equation(right, n):
    """Both ends are the p whose score test is at its 95 % point: (m - p)^2 = z^2 p (1 - p) / n."""
    m = right / n
    for p in wilson(m, mean_and_error([1.0] * right + [0.0] * (n - right))[1], n):
        if 0 < p < 1:
            assert (m - p) ** 2 == pytest.approx(Z95**2 * p * (1 - p) / n, rel=1e-9)


def test_intervals_of_several_samples_cover_the_truth():
    """30 problems, 16 samples each, difficulties of every kind: the interval holds the truth in 95 % of runs."""
    rng, hits, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        difficulty = rng.beta(0.4, 1.0, 30)
        values = (rng.random((30, 16)) < difficulty[:, None]).mean(1).tolist()
        low, high = wilson(*mean_and_error(values), problems=30, samples=16)
        hits += low <= 0.4 / 1.4 <= high
    assert 0.92 <= hits / runs <= 0.985


@given(st.floats(0, 1), st.floats(0, 0.5), st.integers(1, 50), st.integers(1, 16))
def test_interval_holds_the_mean_and_more_samples_never_widen_it(mean, error, problems, samples):
    low, high = wilson(mean, error, problems, samples)
    assert -1e-12 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1
    one = wilson(mean, error, problems, 1)
    assert high - low <= one[1] - one[0] + 1e-12


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error_says():
    value_P = np.random.default_rng(1).normal(size=200)
    low, high = bootstrap(np.mean, value_P, seed=3)
    half = Z95 * mean_and_error(value_P.tolist())[1]
    assert (low, high) == pytest.approx((value_P.mean() - half, value_P.mean() + half), abs=0.02)
    assert bootstrap(np.mean, value_P, seed=3) == (low, high)


def test_the_bootstrap_draws_each_group_apart_and_leaves_out_what_has_no_value():
    sizes = set()

    def ratio(a, b):
        sizes.add((len(a), len(b), a.max() < 10 <= b.min()))
        return a.mean() / b.mean() if 9 in a else np.nan

    low, high = bootstrap(ratio, np.arange(10.0), np.full(3, 10.0), seed=0, resamples=200)
    assert sizes == {(10, 3, True)}
    assert 0 < low < 0.45 < high < 0.9


def test_powers_of_two():
    assert [powers_of_two(n) for n in (1, 2, 3, 16)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16]]
