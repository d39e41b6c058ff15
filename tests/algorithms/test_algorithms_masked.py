"""Sums, whitening, discounted sums and group sums against plain loops."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import batch
from torch.testing import assert_close

from prime_lightning.algorithms.masked import (
    group_mean,
    group_pairs,
    group_sum,
    masked_mean,
    masked_sum,
    reverse_cumsum,
    whiten,
)

seeds = pytest.mark.parametrize("seed", range(8))


def kept(x_BT, mask_BT):
    return [float(x) for x, m in zip(x_BT.flatten(), mask_BT.flatten(), strict=True) if m]


def suffix_sums(x_BT, mask_BT, gamma):
    """The definition, in float64: each trained token of a response is one step of time."""
    out_BT = torch.zeros(mask_BT.shape)
    for i in range(len(x_BT)):
        places = [t for t in range(x_BT.shape[1]) if mask_BT[i, t]]
        for a, t in enumerate(places):
            out_BT[i, t] = sum(gamma ** (b - a) * float(x_BT[i, s]) for b, s in enumerate(places) if b >= a)
    return out_BT


@seeds
def test_moments_are_those_of_the_kept_numbers(seed):
    c = batch(seed)
    mask_BT = c.mask_BT & c.valid_B[:, None]
    numbers = kept(c.process_BT, mask_BT)
    assert_close(masked_sum(c.process_BT, mask_BT), torch.tensor(sum(numbers)))
    assert_close(masked_mean(c.process_BT, mask_BT), torch.tensor(statistics.mean(numbers)))
    rows = [kept(x_T, m_T) for x_T, m_T in zip(c.process_BT, mask_BT, strict=True)]
    assert_close(masked_mean(c.process_BT, mask_BT, dim=1), torch.tensor([sum(r) / max(len(r), 1) for r in rows]))


def test_an_empty_mask_gives_zero_and_a_gradient_of_zero():
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    nothing = torch.zeros(2, 3).bool()
    for value in (masked_sum(x, nothing), masked_mean(x, nothing), masked_mean(x, nothing, dim=1).sum()):
        assert value == 0
        assert_close(torch.autograd.grad(value, x)[0], torch.zeros(2, 3))
    assert_close(whiten(x, nothing), torch.zeros(2, 3))


def test_low_precision_is_summed_in_float32():
    x = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)  # a running bfloat16 sum stops growing at 32
    assert_close(masked_sum(x, torch.ones(1, 4096).bool()), torch.tensor(4096 * 0.10009765625))


@seeds
@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5, 0.0])
def test_reverse_cumsum(seed, gamma):
    c = batch(seed)
    mask_BT = c.mask_BT & c.valid_B[:, None]
    assert_close(reverse_cumsum(c.process_BT, mask_BT, gamma), suffix_sums(c.process_BT, mask_BT, gamma))


def test_reverse_cumsum_by_hand():
    x_BT, mask_BT = torch.tensor([[8.0, 99.0, 4.0, 2.0]]), torch.tensor([[True, False, True, True]])
    # 2; 4 + 2/2 = 5; the hole takes no time, so 8 + 5/2 = 10.5
    assert_close(reverse_cumsum(x_BT, mask_BT, 0.5), torch.tensor([[10.5, 0.0, 5.0, 2.0]]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.floats(0, 1), st.integers(0, 10**6))
def test_reverse_cumsum_of_any_length_obeys_its_recursion(length, gamma, seed):
    x_BT = torch.randn(2, length, generator=torch.Generator().manual_seed(seed))
    sums_BT = reverse_cumsum(x_BT, torch.ones(2, length).bool(), gamma)
    after_BT = torch.cat([sums_BT[:, 1:], torch.zeros(2, 1)], dim=1)
    assert_close(sums_BT, x_BT + gamma * after_BT, rtol=1e-4, atol=1e-5)


def test_reverse_cumsum_is_continuous_at_gamma_one_and_safe_when_long():
    x_BT = torch.randn(1, 8192, generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones(1, 8192).bool()
    plain_BT = x_BT.double().flip(-1).cumsum(-1).flip(-1).float()
    assert_close(reverse_cumsum(x_BT, mask_BT, 1 - 1e-9), plain_BT, rtol=1e-3, atol=1e-3)
    # gamma^8192 is 0 in float32: a cumsum divided by gamma^t would be NaN. A constant 1 sums to 1 / (1 - gamma) = 2.
    assert_close(reverse_cumsum(torch.ones(1, 8192), mask_BT, 0.5)[0, 0], torch.tensor(2.0))


@seeds
def test_whiten_has_mean_zero_and_variance_one(seed):
    c = batch(seed)
    mask_BT = c.mask_BT & c.valid_B[:, None]
    white_BT = whiten(c.process_BT, mask_BT)
    numbers = kept(white_BT, mask_BT)
    assert abs(statistics.mean(numbers)) < 1e-6
    assert abs(statistics.variance(numbers) - 1) < 1e-5
    assert white_BT[~mask_BT].abs().sum() == 0


@seeds
def test_whiten_over_two_ranks_is_whiten_of_both_batches(seed):
    c = batch(seed)
    mask_BT = c.mask_BT & c.valid_B[:, None]
    halves = slice(0, 5), slice(5, None)
    expected_BT = whiten(c.process_BT, mask_BT)
    # What the other rank contributes is computed here, in the order of the calls: (sum, count), then squares.
    x_BT = torch.where(mask_BT, c.process_BT, 0.0)
    mean = x_BT.sum() / mask_BT.sum()
    for own, other in (halves, halves[::-1]):
        x_T, m_T = x_BT[other], mask_BT[other]
        theirs = iter([torch.stack([x_T.sum(), m_T.sum().float()]), (((x_T - mean) * m_T) ** 2).sum()])

        def all_reduce(tensor, how, theirs=theirs):
            assert how == "sum"
            return tensor + next(theirs)

        assert_close(whiten(c.process_BT[own], mask_BT[own], all_reduce=all_reduce), expected_BT[own])


@seeds
def test_group_sums_means_and_pairs(seed):
    c = batch(seed)
    n = len(c.group_B)
    together = [[j for j in range(n) if c.group_B[j] == c.group_B[i]] for i in range(n)]
    size_B = group_sum(torch.ones(n), c.group_B)
    assert size_B.tolist() == [len(members) for members in together]
    known = [[float(c.outcome_B[j]) for j in members if c.valid_B[j]] for members in together]
    means = [sum(values) / max(len(values), 1) for values in known]
    assert_close(group_mean(c.outcome_B, c.group_B, c.valid_B), torch.tensor(means))
    expected = {
        (i, j)
        for i in range(n)
        for j in together[i]
        if c.valid_B[i] and c.valid_B[j] and c.outcome_B[i] > c.outcome_B[j]
    }
    better, worse = group_pairs(c.outcome_B, c.group_B, c.valid_B)
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == expected
    assert len(better) == len(expected)
