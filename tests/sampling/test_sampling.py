"""Drawing one token from logits: against slow loops, and by counting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from prime_lightning.engines.hf import draw, truncate, uniform
from prime_lightning.engines.samples import mix, sample_keys
from prime_lightning.rollout import Sampling

logits = st.lists(st.floats(-8, 8), min_size=2, max_size=12, unique_by=lambda x: round(x, 2))


def probabilities(values, temperature=1.0, top_k=0, top_p=1.0):
    """The definition: sort, keep the k likeliest, then the smallest set that reaches top_p, then renormalise."""
    weights = [math.exp(x / temperature) for x in values]
    order = sorted(range(len(values)), key=lambda i: -weights[i])
    kept = order[: top_k or None]
    total, reached = sum(weights[i] for i in kept), 0.0
    nucleus = []
    for i in kept:
        if nucleus and reached >= top_p:
            break
        nucleus.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(values))]


@settings(max_examples=200, deadline=None)
@given(logits, st.integers(0, 12), st.floats(0.01, 1))
def test_truncate_keeps_the_likeliest_tokens(values, top_k, top_p):
    expected = probabilities(values, top_k=top_k, top_p=top_p)
    shares = sorted(probabilities(values, top_k=top_k), reverse=True)
    if any(abs(x - top_p) < 1e-5 for x in np.cumsum(shares)):
        return  # at the very edge of the set float32 may decide either way
    got_RV = truncate(torch.tensor([values]), top_k, top_p).softmax(-1)
    assert_close(got_RV, torch.tensor([expected]), rtol=1e-4, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(logits, st.floats(0, 1, exclude_max=True), st.sampled_from([1.0, 0.7, 2.0]), st.integers(0, 4))
def test_draw_inverts_the_cumulative_distribution(values, number, temperature, top_k):
    shares = probabilities(values, temperature, top_k)
    borders = np.cumsum(shares)
    if np.abs(borders - number).min() < 1e-5:
        return
    expected = next(i for i, border in enumerate(borders) if number < border)
    sampling = Sampling(temperature=temperature, top_k=top_k)
    tokens_R, logprobs_R = draw(torch.tensor([values]), sampling, np.array([number]))
    assert tokens_R.tolist() == [expected]
    assert logprobs_R.item() == pytest.approx(math.log(shares[expected]), abs=1e-4)


def test_tokens_of_probability_zero_are_never_drawn():
    logits_RV = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    tokens_R, logprobs_R = draw(logits_RV, Sampling(), np.array([0.0, 0.5, 1 - 2.0**-53]))
    assert tokens_R.tolist() == [1, 3, 3]
    assert_close(logprobs_R, torch.full((3,), -math.log(2)))


def test_greedy_takes_the_likeliest_token_with_its_logprob_at_temperature_one():
    tokens_R, logprobs_R = draw(torch.tensor([[0.0, 2.0, 1.0]]), Sampling(temperature=0, top_k=1), np.array([0.1]))
    assert tokens_R.tolist() == [1]
    assert_close(logprobs_R, torch.tensor([0.0, 2.0, 1.0]).log_softmax(0)[1:2])


def test_uniform_numbers_are_uniform_and_uncorrelated():
    keys = sample_keys(0, range(500), 8)
    table = np.stack([uniform(keys, step) for step in range(50)])  # 50 x 4000
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    assert abs(chi2 - 99) < 5 * math.sqrt(2 * 99)
    centred = table - 0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred[:, 8:], centred[:, :-8])):
        assert abs((a * b).mean() * 12) < 5 / math.sqrt(a.size)  # neighbours in step, in sample, in prompt


def test_keys_differ_in_seed_draw_and_number():
    keys = np.concatenate([sample_keys(seed, range(100), 16) for seed in range(10)])
    assert len(set(keys.tolist())) == 10 * 100 * 16
    assert sample_keys(3, [5, 9], 2)[2:].tolist() == sample_keys(3, [9], 4)[:2].tolist()


@given(st.integers(0, 2**64 - 1))
def test_mix_is_splitmix64(number):
    x = (number + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    assert int(mix(np.array([number], dtype=np.uint64))[0]) == x ^ (x >> 31)


def test_mix_gives_the_published_numbers():
    assert int(mix(np.array([0], dtype=np.uint64))[0]) == 0xE220A8397B1DCDAF  # first output of SplitMix64, seed 0
