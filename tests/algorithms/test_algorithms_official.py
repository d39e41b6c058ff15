"""Mode `official` equals the released functions to float32 rounding, wherever those are defined."""

import official
import pytest
import torch
from ragged import dense
from torch.testing import assert_close

from prime_lightning import algorithms as ours

seeds = pytest.mark.parametrize("seed", range(24))
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
GAMMAS = [(1.0, 1.0), (1.0, 0.9), (0.95, 0.5), (0.3, 1.0)]


def parts(c):
    return c.mask_BT, c.group_B, c.valid_B


@seeds
def test_rloo_official_and_whiten_are_the_released_advantage(seed):
    c = dense(seed, samples=2 + seed % 4)
    gamma_outcome, gamma_process = GAMMAS[seed % 4]
    mine_BT = sum(
        ours.rloo_official(
            c.outcome_B, c.process_BT, *parts(c), gamma_outcome=gamma_outcome, gamma_process=gamma_process
        )
    )
    theirs_BT = official.rloo_returns(c.outcome_B, c.process_BT, c.mask_BT, c.samples, gamma_outcome, gamma_process)
    assert_close(mine_BT, theirs_BT * c.mask_BT, **CLOSE)
    whitened_BT = official.whiten(theirs_BT, c.mask_BT)
    assert_close(ours.whiten(mine_BT, c.mask_BT), whitened_BT * c.mask_BT, **CLOSE)


@seeds
def test_rloo_official_after_batch_max_is_the_released_chain(seed):
    c = dense(seed)
    mine_BT, _ = ours.normalise(c.process_BT, c.mask_BT, "batch_max")
    theirs_BT = official.batch_norm(c.process_BT)
    assert_close(mine_BT, theirs_BT, **CLOSE)
    mine_BT = ours.whiten(sum(ours.rloo_official(c.outcome_B, mine_BT, *parts(c))), c.mask_BT)
    theirs_BT = official.whiten(official.rloo_returns(c.outcome_B, theirs_BT, c.mask_BT, 4, 1.0, 1.0), c.mask_BT)
    assert_close(mine_BT, theirs_BT * c.mask_BT, **CLOSE)


@seeds
def test_rloo_official_is_leave_one_out_plus_the_extra_term(seed):
    # r_s K/(K-1) - S/(K-1) = [r_s - (S - m_i)/(K-1)] + (r_s - m_i)/(K-1)
    c = dense(seed)
    extra_BT = (c.process_BT - ours.masked_mean(c.process_BT, c.mask_BT, dim=1)[:, None]) / (c.samples - 1)
    outcome_BT, process_BT = ours.rloo(c.outcome_B, c.process_BT, *parts(c))
    official_BT = ours.rloo_official(c.outcome_B, c.process_BT, *parts(c))
    assert_close(official_BT[0], outcome_BT, **CLOSE)
    assert_close(official_BT[1], process_BT + ours.reverse_cumsum(extra_BT, c.mask_BT), **CLOSE)


@seeds
def test_ce(seed):
    c = dense(seed)
    reward_B = ours.process_reward(c.process_BT, torch.zeros_like(c.process_BT), c.mask_BT, beta=0.05).sum(1)
    total, count = ours.ce(reward_B, c.outcome_B, c.group_B, c.valid_B)
    assert_close(total / count, official.ce(c.process_BT, c.outcome_B, c.mask_BT, beta=0.05), **CLOSE)


def test_ce_keeps_the_gradient_the_release_loses():
    log_ratio_BT = torch.full((1, 400), 1.0, requires_grad=True)  # beta * sum = 20, sigmoid rounds to 1
    mask_BT, wrong_B = torch.ones(1, 400).bool(), torch.zeros(1)
    loss = official.ce(log_ratio_BT, wrong_B, mask_BT, beta=0.05)
    loss.backward()
    assert loss == 100  # binary_cross_entropy clamps its logarithm
    assert log_ratio_BT.grad.abs().max() == 0
    reward_B = torch.tensor([20.0], requires_grad=True)
    ours.ce(reward_B, wrong_B, torch.zeros(1), torch.tensor([True]))[0].backward()
    assert_close(reward_B.grad, torch.ones(1))  # sigmoid(20) - 0


@seeds
def test_pairwise_accuracy(seed):
    c = dense(seed, binary=True, samples=2 + seed % 4)
    for g, share in enumerate(official.group_accuracies(c.process_BT, c.outcome_B, c.mask_BT, c.samples)):
        right, pairs = ours.pairwise_accuracy(c.process_BT.sum(1), c.outcome_B, c.group_B, c.group_B == g)
        assert_close(float(right / pairs) if pairs else 0.5, share, rtol=1e-6, atol=0)


def test_the_released_accuracy_of_ties_depends_on_the_order():
    # Why ours differs: a PRM that equals its reference knows nothing, whatever the order of the batch.
    score_BT, mask_BT = torch.zeros(2, 1), torch.ones(2, 1).bool()
    wrong_first, right_first = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    assert official.group_accuracies(score_BT, wrong_first, mask_BT, 2) == [1.0]
    assert official.group_accuracies(score_BT, right_first, mask_BT, 2) == [0.0]
    for outcome_B in (wrong_first, right_first):
        right, pairs = ours.pairwise_accuracy(torch.zeros(2), outcome_B, torch.zeros(2), torch.ones(2).bool())
        assert (float(right), int(pairs)) == (0.5, 1)


@seeds
def test_clipped_surrogate(seed):
    c = dense(seed)
    n = c.mask_BT.sum()
    mine, metrics = ours.clipped_surrogate(c.policy_BT, c.proximal_BT, c.values_BT, c.mask_BT)
    loss, fraction, drift = official.policy_loss(c.policy_BT, c.proximal_BT, c.values_BT, c.mask_BT, 0.2)
    assert_close(mine / n, loss, **CLOSE)
    assert_close(metrics["policy/clip_fraction"] / n, fraction, **CLOSE)
    assert_close(ours.masked_mean(ours.kl(c.proximal_BT, c.policy_BT, "k1"), c.mask_BT), drift, **CLOSE)


@seeds
def test_value_loss(seed):
    c = dense(seed)
    n = c.mask_BT.sum()
    mine, metrics = ours.value_loss(c.policy_BT, c.proximal_BT, c.values_BT, c.mask_BT, clip=0.2)
    loss, fraction = official.value_loss(c.policy_BT, c.proximal_BT, c.values_BT, c.mask_BT, 0.2)
    assert_close(mine / n, loss, **CLOSE)
    assert_close(metrics["value/clip_fraction"] / n, fraction, **CLOSE)


@seeds
def test_gae_with_one_discount_and_whitening(seed):
    c = dense(seed)
    gamma, lam = [(1.0, 1.0), (0.9, 1.0), (1.0, 0.8), (0.7, 0.6)][seed % 4]
    values_BT = c.values_BT / 2.0  # in the unit of the outcome
    gammas = {"gamma_outcome": gamma, "gamma_process": gamma, "lam": lam}
    credit = ours.gae(c.outcome_B, c.process_BT, *parts(c), values_BT=values_BT, **gammas)
    advantage_BT = sum(ours.mixed(credit, outcome_weight=2.0, process_weight=0.5))
    reward_BT = 0.5 * c.process_BT
    reward_BT[torch.arange(len(reward_BT)), c.mask_BT.sum(1) - 1] += 2.0 * c.outcome_B
    whitened_BT, returns_BT = official.gae(reward_BT, c.values_BT, c.mask_BT, gamma, lam)
    assert_close(ours.whiten(advantage_BT, c.mask_BT), whitened_BT * c.mask_BT, **CLOSE)
    assert_close(ours.gae_returns(advantage_BT, c.values_BT, c.mask_BT), returns_BT * c.mask_BT, **CLOSE)


@seeds
def test_granularity_response_is_the_released_whole(seed):
    c = dense(seed)
    mine_BT = ours.to_granularity(c.process_BT, c.mask_BT, "response")
    assert_close(mine_BT, official.whole(c.process_BT, c.mask_BT), **CLOSE)


@seeds
def test_detached_dpo_value_and_gradient(seed):
    c = dense(seed, samples=2 + seed % 4)
    log_ratio_BT = c.process_BT.requires_grad_()
    total, count = ours.dpo_detached(0.5 * (log_ratio_BT * c.mask_BT).sum(1), c.outcome_B, c.group_B, c.valid_B)
    mine = total / count
    theirs = official.detached_dpo(log_ratio_BT, c.outcome_B, c.mask_BT, 0.5, c.samples)
    assert_close(mine, theirs, **CLOSE)
    assert_close(torch.autograd.grad(mine, log_ratio_BT)[0], torch.autograd.grad(theirs, log_ratio_BT)[0], **CLOSE)
