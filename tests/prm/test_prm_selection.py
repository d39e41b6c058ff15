"""Averages over all sets of n samples, against going through them one by one."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_lightning.evaluation.statistics import pass_at_k
from prime_lightning.prm.selection import best_of_n, sets_of, vote

SAMPLES = st.lists(
    st.tuples(*map(st.sampled_from, ([0.0, 0.5, 1.0], [-1.0, 0.0, 0.25, 2.0], ["4", "5", "6", None]))),
    min_size=1,
    max_size=6,
)


def every_set(count, n):
    return list(itertools.combinations(range(count), n))


def mean(values):
    return sum(values) / len(values)


def slow_best(chosen, outcomes, scores):
    top = max(scores[i] for i in chosen)
    return mean([outcomes[i] for i in chosen if scores[i] == top])


def slow_vote(chosen, outcomes, weights, answers):
    votes, of = defaultdict(float), defaultdict(list)
    for i in chosen:
        if answers[i] is not None:
            votes[answers[i]] += weights[i]
            of[answers[i]].append(outcomes[i])
    if not votes:
        return 0.0
    return mean([mean(of[a]) for a in votes if math.isclose(votes[a], max(votes.values()), rel_tol=1e-9)])


@settings(deadline=None, max_examples=60)
@given(SAMPLES, st.data())
def test_every_estimator_is_the_mean_over_all_sets(samples, data):
    outcomes, scores, answers = (list(column) for column in zip(*samples, strict=True))
    n = data.draw(st.integers(1, len(samples)))
    chosen = every_set(len(samples), n)
    outcome_N, score_N = np.array(outcomes), np.array(scores)
    oracle = best_of_n((outcome_N == 1).astype(float), (outcome_N == 1).astype(float), n)
    assert oracle == pytest.approx(pass_at_k(outcomes.count(1.0), len(samples), n))
    assert best_of_n(score_N, outcome_N, n) == pytest.approx(mean([slow_best(c, outcomes, scores) for c in chosen]))
    sets_SN = sets_of(len(samples), n, 1000, np.random.default_rng(0))
    assert len(sets_SN) == math.comb(len(samples), n)
    for weight_N in (np.ones(len(samples)), 1 / (1 + np.exp(-score_N))):
        expected = mean([slow_vote(c, outcomes, weight_N, answers) for c in chosen])
        assert vote(answers, weight_N, outcome_N, sets_SN) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(SAMPLES)
def test_one_sample_is_the_mean_and_all_samples_are_one_pick(samples):
    outcome_N, score_N = np.array([s[0] for s in samples]), np.array([s[1] for s in samples])
    assert best_of_n(score_N, outcome_N, 1) == pytest.approx(outcome_N.mean())
    assert best_of_n(outcome_N, outcome_N, len(samples)) == outcome_N.max()  # an oracle picks the best


def test_random_sets_are_of_the_size_asked_for_and_come_close():
    rng = np.random.default_rng(0)
    outcome_N = (rng.random(30) < 0.4).astype(float)
    answers = ["right" if o else f"wrong {rng.integers(3)}" for o in outcome_N]
    sets_SN = sets_of(30, 5, 4000, rng)
    assert (len(sets_SN), set(sets_SN.sum(1).tolist())) == (4000, {5})
    assert np.allclose(sets_SN.mean(0), 5 / 30, atol=0.03)
    close = vote(answers, np.ones(30), outcome_N, sets_SN)
    again = vote(answers, np.ones(30), outcome_N, sets_of(30, 5, 4000, np.random.default_rng(9)))
    assert close == pytest.approx(again, abs=0.03)
