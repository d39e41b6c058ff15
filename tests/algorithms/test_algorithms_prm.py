"""PRM losses and health figures against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import batch
from torch.testing import assert_close

from prime_lightning.algorithms import (
    BaseRate,
    auc,
    calibration_error,
    ce,
    dpo,
    dpo_detached,
    kto,
    nca,
    pairwise_accuracy,
    rloo,
)

seeds = pytest.mark.parametrize("seed", range(8))
LOSSES = [ce, dpo, dpo_detached, kto, nca]
every_loss = pytest.mark.parametrize("loss", LOSSES)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def call(loss, c, reward_B=None):
    return loss(c.reward_B if reward_B is None else reward_B, c.outcome_B, c.group_B, c.valid_B)


def members(c, i):
    return [j for j in range(len(c.group_B)) if c.valid_B[j] and c.group_B[j] == c.group_B[i]]


def known(c):
    return [i for i in range(len(c.group_B)) if c.valid_B[i]]


@seeds
def test_ce_is_cross_entropy_with_soft_labels(seed):
    c = batch(seed)
    # -log sigmoid(r) = softplus(-r), -log(1 - sigmoid(r)) = softplus(r)
    terms = [
        float(c.outcome_B[i]) * softplus(-float(c.reward_B[i]))
        + (1 - float(c.outcome_B[i])) * softplus(float(c.reward_B[i]))
        for i in known(c)
    ]
    total, count = call(ce, c)
    assert_close(total, torch.tensor(sum(terms)))
    assert int(count) == len(terms)


@seeds
def test_ce_is_a_sum_over_responses_and_says_so(seed):
    c = batch(seed)
    halves = [ce(c.reward_B[h], c.outcome_B[h], c.group_B[h], c.valid_B[h]) for h in (slice(0, 5), slice(5, None))]
    total, count = call(ce, c)
    assert_close(sum(t for t, _ in halves), total)
    assert sum(n for _, n in halves) == count
    assert ce.whole_groups is False
    assert all(getattr(loss, "whole_groups", True) for loss in LOSSES[1:])


@seeds
def test_dpo_is_over_all_ordered_pairs(seed):
    c = batch(seed)
    terms = [
        softplus(float(c.reward_B[j] - c.reward_B[i]))
        for i in known(c)
        for j in members(c, i)
        if c.outcome_B[i] > c.outcome_B[j]
    ]
    total, count = call(dpo, c)
    assert_close(total, torch.tensor(sum(terms)))
    assert int(count) == len(terms) > 0


def judged(c, i):
    """Reward and outcome of a response, and the mean reward of its opponents, 0 without any."""
    label = float(c.outcome_B[i])
    against = [j for j in members(c, i) if (c.outcome_B[j] < label if label > 0 else c.outcome_B[j] > label)]
    return float(c.reward_B[i]), label, sum(float(c.reward_B[j]) for j in against) / len(against) if against else 0.0


@seeds
def test_the_detached_loss_follows_the_recipe(seed):
    c = batch(seed)
    total = 0.0
    for i in known(c):
        own, label, opponents = judged(c, i)
        margin = own - opponents
        total += softplus(-margin if label > 0 else margin)
    mine, count = call(dpo_detached, c)
    assert_close(mine, torch.tensor(total))
    assert int(count) == len(known(c))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@seeds
def test_kto_is_one_minus_the_value_of_each_response(seed):
    c = batch(seed)
    total = 0.0
    for i in known(c):
        own, label, opponents = judged(c, i)
        point = max(0.0, opponents)
        total += 1.5 * (1 - sigmoid(own - point)) if label > 0 else 0.5 * (1 - sigmoid(point - own))
    mine, count = kto(c.reward_B, c.outcome_B, c.group_B, c.valid_B, desirable=1.5, undesirable=0.5)
    assert_close(mine, torch.tensor(total))
    assert int(count) == len(known(c))


@seeds
def test_nca_weighs_the_responses_of_a_prompt(seed):
    c = batch(seed)
    total, prompts = 0.0, {int(c.group_B[i]) for i in known(c)}
    for prompt in prompts:
        rows = [i for i in known(c) if c.group_B[i] == prompt]
        powers = [math.exp(float(c.outcome_B[i]) / 0.3) for i in rows]
        for i, power in zip(rows, powers, strict=True):
            r = float(c.reward_B[i])
            total += power / sum(powers) * softplus(-r) + softplus(r) / len(rows)
    mine, count = nca(c.reward_B, c.outcome_B, c.group_B, c.valid_B, alpha=0.3)
    assert_close(mine, torch.tensor(total))
    assert int(count) == len(prompts)


def test_nca_of_a_pair_is_the_form_for_pairs():
    reward_B, both = torch.tensor([0.3, -1.2]), torch.ones(2).bool()
    total, _ = nca(reward_B, torch.tensor([1.0, 0.0]), torch.zeros(2), both)
    assert_close(total, torch.tensor(softplus(-0.3) + 0.5 * softplus(0.3) + 0.5 * softplus(-1.2)))
    even = torch.zeros(2, requires_grad=True)
    level, _ = nca(even, torch.zeros(2), torch.zeros(2), both)
    assert_close(torch.autograd.grad(level, even)[0], torch.zeros(2))  # all wrong: rewards of 0 are the least
    with pytest.raises(ValueError, match="Expected `alpha` positive, got 0"):
        nca(reward_B, torch.zeros(2), torch.zeros(2), both, alpha=0)


def test_detached_opponents_get_no_gradient():
    reward_B = torch.tensor([0.0, 2.0], requires_grad=True)
    group_B, both = torch.zeros(2), torch.ones(2).bool()
    total, _ = dpo_detached(reward_B, torch.tensor([1.0, 0.0]), group_B, both)
    # Both margins are -2: d/dr of softplus(2 - r) at 0 is -sigmoid(2), of softplus(r - 0) at 2 is +sigmoid(2).
    slope = 1 / (1 + math.exp(-2))
    assert_close(torch.autograd.grad(total, reward_B)[0], torch.tensor([-slope, slope]))
    pair, _ = dpo(reward_B, torch.tensor([1.0, 0.0]), group_B, both)
    assert_close(pair * 2, total)  # in value two detached terms are one pair, twice


@every_loss
@seeds
def test_invalid_members_do_not_exist(seed, loss):
    c = batch(seed)
    keep = c.valid_B
    alone = loss(c.reward_B[keep], c.outcome_B[keep], c.group_B[keep], c.valid_B[keep])
    reward_B = c.reward_B.clone().requires_grad_()
    total, count = call(loss, c, reward_B)
    assert_close(total, alone[0])
    assert count == alone[1]
    gradient_B = torch.autograd.grad(total, reward_B)[0]
    assert gradient_B.isfinite().all()
    assert gradient_B[~keep].abs().sum() == 0
    assert gradient_B.abs().sum() > 0


@every_loss
@seeds
def test_the_count_is_known_before_the_rewards(seed, loss):
    c = batch(seed)
    assert call(loss, c, torch.zeros_like(c.reward_B))[1] == call(loss, c)[1]


@every_loss
def test_nothing_known_is_no_loss_but_a_graph(loss):
    reward_B = torch.zeros(3, requires_grad=True)
    total, count = loss(reward_B, torch.full((3,), torch.nan), torch.zeros(3), torch.zeros(3).bool())
    assert (total.item(), count.item()) == (0, 0)
    assert_close(torch.autograd.grad(total, reward_B)[0], torch.zeros(3))  # backward must run on every rank


@every_loss
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_huge_rewards_stay_finite(loss, size):
    reward_B = torch.tensor([-size, size], requires_grad=True)
    total, _ = loss(reward_B, torch.tensor([1.0, 0.0]), torch.zeros(2), torch.ones(2).bool())
    assert total.isfinite()
    assert total >= (2.0 if loss is kto else size)  # KTO is bounded by its weights
    assert torch.autograd.grad(total, reward_B)[0].isfinite().all()


@seeds
def test_the_first_step_of_dpo_is_that_of_rloo(seed):
    """At `r = 0`, `-grad dpo = sum over groups of (K - 1) / 2 * A_i`, with `A_i` the outcome credit of `rloo`."""
    c = batch(seed)
    reward_B, right_B = torch.zeros(len(c.group_B), requires_grad=True), (c.outcome_B > 0.5).float()
    (gradient_B,) = torch.autograd.grad(dpo(reward_B, right_B, c.group_B, c.valid_B)[0], reward_B)
    outcome_BT, _ = rloo(right_B, None, torch.ones_like(c.mask_BT), c.group_B, c.valid_B)
    others_B = torch.tensor([float(len(members(c, i)) - 1) for i in range(len(c.group_B))])
    assert_close(-gradient_B, others_B / 2 * outcome_BT[:, 0])


@seeds
def test_a_constant_per_prompt_cancels_in_dpo_only(seed):
    c = batch(seed)
    shifted_B = c.reward_B + 3.0 * c.group_B.sign()
    assert_close(call(dpo, c, shifted_B)[0], call(dpo, c)[0], rtol=1e-4, atol=1e-5)
    assert abs(call(ce, c, shifted_B)[0] - call(ce, c)[0]) > 0.1


@seeds
def test_pairwise_accuracy_counts_pairs(seed):
    c = batch(seed)
    c.reward_B = c.reward_B.round()  # ties
    marks = [
        1.0 if c.reward_B[i] > c.reward_B[j] else 0.5 if c.reward_B[i] == c.reward_B[j] else 0.0
        for i in known(c)
        for j in members(c, i)
        if c.outcome_B[i] > c.outcome_B[j]
    ]
    right, count = call(pairwise_accuracy, c)
    assert (float(right), int(count)) == (sum(marks), len(marks))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_turning_the_rewards_round_turns_the_accuracy_round(seed):
    c = batch(seed)
    right, count = call(pairwise_accuracy, c)
    assert call(pairwise_accuracy, c, -c.reward_B)[0] == count - right


@seeds
def test_auc_is_the_share_of_ordered_pairs(seed):
    c = batch(seed)
    c.reward_B = c.reward_B.round()
    right = [float(c.reward_B[i]) for i in known(c) if c.outcome_B[i] > 0.5]
    wrong = [float(c.reward_B[i]) for i in known(c) if c.outcome_B[i] <= 0.5]
    marks = [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
    assert_close(auc(c.reward_B, c.outcome_B, c.valid_B), torch.tensor(sum(marks) / len(marks)))


def test_auc_of_one_group_is_its_pairwise_accuracy():
    outcome_B, all_B = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]), torch.ones(5).bool()
    reward_B = torch.tensor([0.3, 0.1, -0.2, 0.2, -0.4])
    right, count = pairwise_accuracy(reward_B, outcome_B, torch.zeros(5), all_B)
    assert_close(auc(reward_B, outcome_B, all_B), right / count)  # 3 + 1 of 6


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_auc_without_both_kinds_is_nan(label):
    assert auc(torch.zeros(3), torch.full((3,), label), torch.ones(3).bool()).isnan()
    assert auc(torch.zeros(3), torch.zeros(3), torch.zeros(3).bool()).isnan()


@seeds
def test_calibration_error_bins_by_chance(seed):
    c = batch(seed, sizes=(4,) * 12)
    bins = {}
    for i in known(c):
        chance = 1 / (1 + math.exp(-float(c.reward_B[i])))
        bins.setdefault(min(int(chance * 5), 4), []).append((chance, float(c.outcome_B[i])))
    gaps = [abs(sum(p for p, _ in rows) - sum(o for _, o in rows)) for rows in bins.values()]  # n_b |mean p - mean o|
    expected = torch.tensor(sum(gaps) / len(known(c)))
    assert_close(calibration_error(c.reward_B, c.outcome_B, c.valid_B, bins=5), expected)


def test_calibration_error_at_its_ends():
    sure_B, all_B = torch.tensor([100.0, -100.0]), torch.ones(2).bool()
    assert calibration_error(sure_B, torch.tensor([1.0, 0.0]), all_B) == 0
    assert calibration_error(sure_B, torch.tensor([0.0, 1.0]), all_B) == 1
    assert calibration_error(sure_B, torch.zeros(2), ~all_B).isnan()
    with pytest.raises(ValueError, match="Expected at least 1 in `bins`"):
        calibration_error(sure_B, torch.zeros(2), all_B, bins=0)


# ---- the intercept


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12), st.floats(0, 0.99))
def test_base_rate_is_a_running_share_of_right_answers(iterations, momentum):
    rate, p = BaseRate(momentum), None
    for right, wrong in iterations:
        got = rate.update(float(right), float(right + wrong))
        if right + wrong:
            mean = (right + 0.5) / (right + wrong + 1)
            p = mean if p is None else momentum * p + (1 - momentum) * mean
        assert got == pytest.approx(0.0 if p is None else math.log(p) - math.log(1 - p))
    again = BaseRate(momentum)
    again.load_state_dict(rate.state_dict())
    assert again.intercept == rate.intercept


def test_ce_with_the_intercept_is_least_at_what_a_response_says_beyond_the_base_rate():
    """Responses of two kinds, right 3 of 4 and 0.2 of 4 times: the best rewards are the log-odds less the intercept."""
    b = math.log(0.4 / 0.6)
    reward_B = torch.zeros(2, requires_grad=True)
    outcome_B, valid_B = torch.tensor([0.75, 0.05]), torch.ones(2, dtype=torch.bool)
    best = torch.tensor([math.log(0.75 / 0.25) - b, math.log(0.05 / 0.95) - b])
    [slope_B] = torch.autograd.grad(ce(reward_B + best + b, outcome_B, torch.arange(2), valid_B)[0], reward_B)
    assert_close(slope_B, torch.zeros(2), atol=1e-6, rtol=0)
