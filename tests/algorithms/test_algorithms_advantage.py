"""Advantage estimators against plain loops written from the paper, numbers by hand, and identities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import batch
from torch.testing import assert_close

from prime_lightning.algorithms import (
    dr_grpo,
    gae,
    gae_returns,
    grpo,
    kl_credit,
    mixed,
    reinforce,
    rloo,
    rloo_official,
    rloo_printed,
)

seeds = pytest.mark.parametrize("seed", range(10))
ESTIMATORS = [rloo, rloo_official, rloo_printed, grpo, dr_grpo, reinforce, gae]
everyone = pytest.mark.parametrize("estimate", ESTIMATORS)
grouped = pytest.mark.parametrize("estimate", [rloo, rloo_official, rloo_printed, grpo, dr_grpo])
NUMBERS = {"gamma_outcome": 0.9, "gamma_process": 0.7, "outcome_weight": 2.0, "process_weight": 0.5, "lam": 0.8}


def apart(estimate, c, process_BT=..., outcome_weight=1.0, **kwargs):
    """Outcome and process credit, as the module asks for them."""
    process_BT = c.process_BT if process_BT is ... else process_BT
    values_BT = c.values_BT / outcome_weight
    return estimate(c.outcome_B, process_BT, c.mask_BT, c.group_B, c.valid_B, values_BT=values_BT, **kwargs)


def call(estimate, c, process_BT=..., outcome_weight=1.0, process_weight=1.0, **kwargs):
    """The advantage: both, weighed."""
    credit = apart(estimate, c, process_BT, outcome_weight, **kwargs)
    return sum(mixed(credit, outcome_weight=outcome_weight, process_weight=process_weight))


def centred(estimate, value, own, others):
    """Credit of one reward `value` of a response whose number is `own`, in the words of Eq. 4, 5, 7, 8."""
    numbers, size = [own, *others], len(others) + 1
    if estimate is reinforce:
        return value
    if size < 2:
        return 0.0
    if estimate in (rloo, rloo_printed):
        return value - sum(others) / len(others)
    if estimate is rloo_official:
        return value * size / (size - 1) - sum(numbers) / (size - 1)
    mean = sum(numbers) / size
    if estimate is dr_grpo:
        return value - mean
    return (value - mean) / (math.sqrt(sum((x - mean) ** 2 for x in numbers) / (size - 1)) + 1e-6)


def slow(estimate, c, gamma_outcome=1.0, gamma_process=1.0, outcome_weight=1.0, process_weight=1.0, lam=1.0):
    """Loops over responses and tokens, in float64."""
    n, length = c.mask_BT.shape
    places = [[t for t in range(length) if c.mask_BT[i, t]] for i in range(n)]
    sums = [sum(float(c.process_BT[i, t]) for t in places[i]) for i in range(n)]
    mean = [sums[i] / (1 if estimate is rloo_printed else max(len(places[i]), 1)) for i in range(n)]
    out_BT = torch.zeros(n, length)
    for i in range(n):
        if not c.valid_B[i]:
            continue
        others = [j for j in range(n) if j != i and c.valid_B[j] and c.group_B[j] == c.group_B[i]]
        outcome = centred(
            estimate, float(c.outcome_B[i]), float(c.outcome_B[i]), [float(c.outcome_B[j]) for j in others]
        )
        for a, t in enumerate(places[i]):
            process = sum(
                gamma_process ** (b - a)
                * centred(estimate, float(c.process_BT[i, s]), mean[i], [mean[j] for j in others])
                for b, s in enumerate(places[i])
                if b >= a
            )
            discounted = gamma_outcome ** (len(places[i]) - 1 - a) * outcome
            out_BT[i, t] = outcome_weight * discounted + process_weight * process
    return out_BT


def slow_gae(c, gamma_outcome=1.0, gamma_process=1.0, outcome_weight=1.0, process_weight=1.0, lam=1.0):
    """Temporal differences summed token by token, in float64."""
    out_BT = torch.zeros(c.mask_BT.shape)
    for i in range(len(out_BT)):
        places = [t for t in range(c.mask_BT.shape[1]) if c.mask_BT[i, t] and c.valid_B[i]]
        values = [float(c.values_BT[i, t]) for t in places] + [0.0]
        rewards = [0.0] * (len(places) - 1) + [outcome_weight * float(c.outcome_B[i])]
        for a, t in enumerate(places):
            for b in range(a, len(places)):
                difference = rewards[b] + gamma_outcome * values[b + 1] - values[b]
                out_BT[i, t] += (gamma_outcome * lam) ** (b - a) * difference
                out_BT[i, t] += (gamma_process * lam) ** (b - a) * process_weight * float(c.process_BT[i, places[b]])
    return out_BT


@seeds
@pytest.mark.parametrize("numbers", [{}, NUMBERS])
@pytest.mark.parametrize("estimate", [rloo, rloo_official, rloo_printed, grpo, dr_grpo, reinforce])
def test_estimators_follow_the_paper(seed, numbers, estimate):
    c = batch(seed)
    assert_close(call(estimate, c, **numbers), slow(estimate, c, **numbers), rtol=1e-4, atol=1e-5)


@seeds
@pytest.mark.parametrize("numbers", [{}, NUMBERS])
def test_gae_follows_its_definition(seed, numbers):
    c = batch(seed)
    assert_close(call(gae, c, **numbers), slow_gae(c, **numbers), rtol=1e-4, atol=1e-5)


def test_rloo_by_hand():
    outcome_B = torch.tensor([1.0, 0.0, 0.0])
    process_BT = torch.tensor([[3.0, 1.0], [2.0, 0.0], [4.0, 0.0]])
    mask_BT = torch.tensor([[True, True], [True, False], [True, False]])
    # Means 2, 2, 4. Baselines of the others: (2+4)/2 = 3, (2+4)/2 = 3, (2+2)/2 = 2.
    # Process, gamma 1/2: row 0: t1 1-3 = -2, t0 (3-3) + -2/2 = -1; row 1: 2-3 = -1; row 2: 4-2 = 2.
    # Outcome: 1 - 0 = 1; 0 - 1/2; 0 - 1/2.
    group_B, valid_B = torch.tensor([5, 5, 5]), torch.ones(3).bool()
    outcome_BT, process_BT = rloo(outcome_B, process_BT, mask_BT, group_B, valid_B, gamma_process=0.5)
    assert_close(outcome_BT, torch.tensor([[1.0, 1.0], [-0.5, 0.0], [-0.5, 0.0]]))
    assert_close(process_BT, torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [2.0, 0.0]]))


def test_outcome_is_discounted_back_from_the_last_token():
    mask_BT, valid_B = torch.tensor([[True, True, True, False], [True, False, False, False]]), torch.ones(2).bool()
    advantage_BT, _ = rloo(torch.tensor([1.0, 0.0]), None, mask_BT, torch.zeros(2), valid_B, gamma_outcome=0.5)
    # Credit 1 - 0 on token 2: 1/4, 1/2, 1. Credit 0 - 1 on token 0.
    assert_close(advantage_BT, torch.tensor([[0.25, 0.5, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]))


@seeds
def test_no_process_reward_is_plain_rloo(seed):
    c = batch(seed)
    plain_BT = call(rloo, c, None)
    assert torch.equal(call(rloo, c, process_weight=0.0), plain_BT)
    assert torch.equal(call(rloo, c, torch.zeros_like(c.process_BT)), plain_BT)
    for i in range(len(c.group_B)):  # Eq. 4, one number for all tokens of the response
        others = [
            float(c.outcome_B[j])
            for j in range(len(c.group_B))
            if j != i and c.valid_B[j] and c.group_B[j] == c.group_B[i]
        ]
        expected = float(c.outcome_B[i]) - sum(others) / len(others) if c.valid_B[i] and others else 0.0
        assert_close(plain_BT[i], torch.where(c.mask_BT[i], expected, 0.0))


@everyone
@seeds
def test_the_parts_know_nothing_of_each_other(seed, estimate):
    c = batch(seed)
    outcome_BT, process_BT = apart(estimate, c)
    alone_BT, nothing_BT = apart(estimate, c, None)
    assert torch.equal(outcome_BT, alone_BT)
    assert nothing_BT.abs().sum() == 0
    c.outcome_B, c.values_BT = 1 - c.outcome_B, c.values_BT + 1
    assert torch.equal(apart(estimate, c)[1], process_BT)


def test_a_part_of_weight_0_is_nothing_whatever_it_was():
    broken = torch.full((2, 2), torch.nan), torch.tensor([[torch.inf, torch.nan], [0.0, 1.0]])
    assert all(part.abs().sum() == 0 for part in mixed(broken, outcome_weight=0.0, process_weight=0.0))


@pytest.mark.parametrize("wrong", [torch.ones(2, 3), (torch.ones(2, 3),)])
def test_an_estimator_that_gives_one_sum_is_refused(wrong):
    with pytest.raises(ValueError, match="two tensors, the credit of the outcome and that of the process reward"):
        mixed(wrong)


@seeds
def test_the_kl_penalty_is_the_process_credit_of_rloo(seed):
    c = batch(seed, holes=False)
    known_B = (c.valid_B[:, None] & c.valid_B & (c.group_B[:, None] == c.group_B)).sum(1) > 1  # has a fellow
    rows = c.mask_BT, c.group_B, c.valid_B
    penalty_BT = kl_credit(c.process_BT, *rows, weight=0.3, gamma=0.7)
    _, expected_BT = rloo(c.outcome_B, -0.3 * c.process_BT, *rows, gamma_process=0.7)
    assert_close(penalty_BT[known_B], expected_BT[known_B], rtol=1e-4, atol=1e-5)
    plain_BT = kl_credit(c.process_BT, *rows, weight=0.3, gamma=0.7, baseline=False)
    assert_close(plain_BT, reinforce(c.outcome_B, -0.3 * c.process_BT, *rows, gamma_process=0.7)[1])
    assert_close(penalty_BT[~known_B], plain_BT[~known_B])


@everyone
@seeds
def test_nothing_outside_mask_and_valid(seed, estimate):
    c = batch(seed)  # NaN stands at every place that may not be read
    advantage_BT = call(estimate, c, **NUMBERS)
    assert advantage_BT.isfinite().all()
    assert advantage_BT[~(c.mask_BT & c.valid_B[:, None])].abs().sum() == 0
    assert advantage_BT.abs().sum() > 0


@everyone
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_permuting_responses_permutes_advantages(estimate, seed, data):
    c = batch(seed)
    order = torch.tensor(data.draw(st.permutations(range(len(c.group_B)))))
    expected_BT = call(estimate, c, **NUMBERS)[order]
    for name in ("outcome_B", "process_BT", "mask_BT", "group_B", "valid_B", "values_BT"):
        setattr(c, name, getattr(c, name)[order])
    assert_close(call(estimate, c, **NUMBERS), expected_BT, rtol=1e-4, atol=1e-5)


@grouped
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-3, 3))
def test_shifting_the_outcomes_of_a_group_changes_nothing(estimate, seed, shift):
    c = batch(seed)
    expected_BT = call(estimate, c, None)
    c.outcome_B = torch.where(c.group_B == c.group_B[0], c.outcome_B + shift, c.outcome_B)
    # grpo divides a group of equal outcomes by 1e-6: rounding of the shift comes out a million times larger
    tolerance = 0.5 if estimate is grpo else 1e-5
    assert_close(call(estimate, c, None), expected_BT, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("estimate", [rloo, rloo_official, grpo, dr_grpo])  # the sums of rloo_printed do not cancel it
@seeds
def test_shifting_the_process_reward_of_a_group_changes_nothing(seed, estimate):
    c = batch(seed)  # a constant per prompt is what CE leaves over (App. C.2)
    shifted_BT = torch.where((c.group_B == c.group_B[0])[:, None], c.process_BT + 2.0, c.process_BT)
    known = (c.mask_BT.any(1) | ~c.valid_B)[c.group_B == c.group_B[0]].all()  # no token: mean 0, not shifted
    if known:
        assert_close(call(estimate, c, shifted_BT), call(estimate, c), rtol=1e-3, atol=1e-3)


@seeds
def test_rloo_outcome_credit_sums_to_zero_in_each_group(seed):
    c = batch(seed, holes=False)
    first_B = call(rloo, c, None)[:, 0]
    for group in c.group_B.unique():
        assert abs(float(first_B[c.group_B == group].sum())) < 1e-5


@seeds
def test_grpo_outcome_credit_has_unit_spread(seed):
    c = batch(seed, holes=False, invalid=False)
    first_B = call(grpo, c, None)[:, 0]
    for group in c.group_B.unique():
        outcome_G = c.outcome_B[c.group_B == group]
        spread = first_B[c.group_B == group].std()
        assert_close(spread, torch.tensor(1.0 if outcome_G.std() > 0 else 0.0), rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 6))
def test_dr_grpo_is_rloo_but_for_one_factor_and_grpo_but_for_the_spread(seed, size):
    c = batch(seed, sizes=(size, size), invalid=False)
    expected_BT = call(dr_grpo, c, None)
    assert_close(call(rloo, c, None) * (size - 1) / size, expected_BT)
    std_B = torch.stack([c.outcome_B[c.group_B == group].std() for group in c.group_B])
    assert_close(call(grpo, c, None) * (std_B + 1e-6)[:, None], expected_BT, rtol=1e-4, atol=1e-5)


@seeds
def test_gae_with_lambda_one_is_return_minus_value(seed):
    c = batch(seed)
    mask_BT = c.mask_BT & c.valid_B[:, None]
    value_BT = torch.where(mask_BT, c.values_BT, 0.0)
    advantage_BT = call(gae, c)
    assert_close(advantage_BT, call(reinforce, c) - value_BT, rtol=1e-4, atol=1e-5)
    assert_close(gae_returns(advantage_BT, c.values_BT, mask_BT), call(reinforce, c), rtol=1e-4, atol=1e-5)


@seeds
def test_gae_with_lambda_zero_is_one_temporal_difference(seed):
    c = batch(seed, holes=False)
    keep_BT = c.mask_BT & c.valid_B[:, None]
    value_BT = torch.where(keep_BT, c.values_BT, 0.0)
    after_BT = torch.cat([value_BT[:, 1:], torch.zeros(len(value_BT), 1)], 1)
    ends_BT = keep_BT & ~torch.cat([keep_BT[:, 1:], torch.zeros(len(keep_BT), 1).bool()], 1)
    reward_BT = torch.where(keep_BT, c.process_BT, 0.0) + torch.where(ends_BT, c.outcome_B[:, None], 0.0)
    expected_BT = torch.where(keep_BT, reward_BT + 0.9 * after_BT - value_BT, 0.0)
    assert_close(call(gae, c, lam=0.0, gamma_outcome=0.9), expected_BT, rtol=1e-4, atol=1e-5)


def test_an_unknown_member_is_as_if_it_had_not_been_sampled():
    c = batch(3, sizes=(4,), invalid=False)
    c.valid_B = torch.tensor([True, True, False, True])
    full_BT = call(rloo, c)
    for name in ("outcome_B", "process_BT", "mask_BT", "group_B", "valid_B", "values_BT"):
        setattr(c, name, getattr(c, name)[[0, 1, 3]])
    assert_close(full_BT[[0, 1, 3]], call(rloo, c))


@grouped
def test_one_known_member_gets_zero_and_a_lone_one_is_refused(estimate):
    mask_BT, outcome_B = torch.ones(3, 2).bool(), torch.tensor([1.0, torch.nan, torch.nan])
    one_known, process_BT = torch.tensor([True, False, False]), torch.ones(3, 2)
    for part_BT in estimate(outcome_B, process_BT, mask_BT, torch.zeros(3), one_known):
        assert part_BT.abs().sum() == 0
    with pytest.raises(ValueError, match=r"got 1 in group 8 .*sampling.samples must be at least 2"):
        estimate(torch.ones(3), process_BT, mask_BT, torch.tensor([7, 8, 7]), torch.ones(3).bool())
    filler = torch.tensor([True, False, True])  # an invalid filler may stand alone
    assert estimate(torch.zeros(3), None, mask_BT, torch.tensor([7, 8, 7]), filler)[0].abs().sum() == 0


def test_gae_without_a_critic_is_refused():
    with pytest.raises(ValueError, match="Expected `values_BT` for gae"):
        gae(torch.ones(1), None, torch.ones(1, 2).bool(), torch.zeros(1), torch.ones(1).bool())


@everyone
def test_no_gradient_flows(estimate):
    c = batch(0)
    c.process_BT.requires_grad_()
    c.values_BT.requires_grad_()
    assert not any(part.requires_grad for part in apart(estimate, c))


@everyone
def test_a_response_without_tokens_is_harmless(estimate):
    c = batch(1, invalid=False)
    c.mask_BT[0] = False
    advantage_BT = call(estimate, c, **NUMBERS)
    assert advantage_BT.isfinite().all()
    assert advantage_BT[0].abs().sum() == 0
