"""Policy, critic and KL losses against plain loops, numbers by hand, and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import batch
from torch.testing import assert_close

from prime_lightning.algorithms import (
    aggregate,
    clipped_surrogate,
    denominator,
    drop_nonfinite,
    importance_weight,
    kl,
    value_loss,
    whiten,
)

seeds = pytest.mark.parametrize("seed", range(8))


def places(mask_BT):
    return [[t for t in range(mask_BT.shape[1]) if mask_BT[i, t]] for i in range(len(mask_BT))]


def slow_surrogate(c, low, high, how, length, weight_BT):
    total, clipped = 0.0, [0, 0]
    for i, tokens in enumerate(places(c.mask_BT)):
        for t in tokens:
            ratio, advantage = math.exp(float(c.policy_BT[i, t] - c.proximal_BT[i, t])), float(c.values_BT[i, t])
            free, bounded = ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage
            share = {"token": 1.0, "sequence": 1 / len(tokens), "constant": 1 / length}[how]
            total -= float(weight_BT[i, t]) * min(free, bounded) * share
            if bounded < free:
                clipped[ratio > 1] += 1
    return total, clipped


@seeds
@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_clipped_surrogate_follows_eq_6(seed, how):
    c = batch(seed)
    weight_BT = torch.rand(c.mask_BT.shape, generator=torch.Generator().manual_seed(seed))
    expected, (low, high) = slow_surrogate(c, 0.1, 0.4, how, 11, weight_BT)
    weight_BT = torch.where(c.mask_BT, weight_BT, torch.nan)
    loss, metrics = clipped_surrogate(
        c.policy_BT,
        c.proximal_BT,
        c.values_BT,
        c.mask_BT,
        clip_low=0.1,
        clip_high=0.4,
        weight_BT=weight_BT,
        aggregate=how,
        constant_length=11,
    )
    assert_close(loss, torch.tensor(expected))
    assert [metrics[f"policy/clip_fraction{end}"] for end in ("", "_low", "_high")] == [low + high, low, high]
    assert low > 0
    assert high > 0
    log_ratio_BT = torch.where(c.mask_BT, c.policy_BT - c.proximal_BT, 0.0)
    assert_close(metrics["policy/ratio"], log_ratio_BT[c.mask_BT].exp().sum())
    assert_close(metrics["policy/approx_kl"], (log_ratio_BT.exp() - 1 - log_ratio_BT).sum(), rtol=1e-4, atol=1e-4)


def test_clipped_surrogate_by_hand():
    # ratio 1.5, A = 1: min(1.5, 1.2) = 1.2, clipped. ratio 0.5, A = 1: min(0.5, 0.8) = 0.5, free.
    # ratio 1.5, A = -1: min(-1.5, -1.2) = -1.5, free. ratio 0.5, A = -1: min(-0.5, -0.8) = -0.8, clipped.
    policy_BT = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log().requires_grad_()
    advantage_BT, mask_BT = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 4).bool()
    loss, metrics = clipped_surrogate(policy_BT, torch.zeros(1, 4), advantage_BT, mask_BT)
    assert_close(loss, torch.tensor(-(1.2 + 0.5 - 1.5 - 0.8)))
    assert metrics["policy/clip_fraction"] == 2
    # Gradient -A * ratio where free, 0 where clipped.
    assert_close(torch.autograd.grad(loss, policy_BT)[0], torch.tensor([[0.0, -0.5, 1.5, 0.0]]))


@seeds
def test_on_policy_the_gradient_is_the_policy_gradient(seed):
    c = batch(seed)
    policy_BT = c.policy_BT.clone().requires_grad_()
    loss, metrics = clipped_surrogate(policy_BT, policy_BT, c.values_BT, c.mask_BT)
    gradient_BT = torch.autograd.grad(loss, policy_BT)[0]
    assert_close(gradient_BT, torch.where(c.mask_BT, -c.values_BT, 0.0))  # also: no NaN from masked-out tokens
    assert metrics["policy/clip_fraction"] == metrics["policy/approx_kl"] == 0
    assert not any(value.requires_grad for value in metrics.values())


@seeds
def test_equal_bounds_are_the_default_and_bounds_act_on_one_side(seed):
    c = batch(seed)
    args = c.policy_BT, c.proximal_BT, c.values_BT.abs(), c.mask_BT
    assert clipped_surrogate(*args)[0] == clipped_surrogate(*args, clip_low=0.2, clip_high=0.2)[0]
    # With positive advantages only the upper bound can bind.
    assert clipped_surrogate(*args)[0] == clipped_surrogate(*args, clip_low=0.9)[0]
    assert clipped_surrogate(*args)[0] > clipped_surrogate(*args, clip_high=9.0)[0]


def test_importance_weights_scale_the_gradient_and_get_none():
    policy_BT, weight_BT = torch.zeros(1, 2, requires_grad=True), torch.tensor([[2.0, 0.5]], requires_grad=True)
    args = policy_BT, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool()
    loss, _ = clipped_surrogate(*args, weight_BT=weight_BT)
    gradient_BT, none = torch.autograd.grad(loss, [policy_BT, weight_BT], allow_unused=True)
    assert_close(gradient_BT, torch.tensor([[-2.0, -0.5]]))
    assert none is None


def test_a_ratio_beyond_all_bounds_stays_finite():
    policy_BT = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss, metrics = clipped_surrogate(policy_BT, torch.zeros(1, 2), -torch.ones(1, 2), torch.ones(1, 2).bool())
    assert loss.isfinite()
    assert all(value.isfinite() for value in metrics.values())
    assert torch.autograd.grad(loss, policy_BT)[0].isfinite().all()


@pytest.mark.parametrize("wrong", [{"clip_low": -0.1}, {"clip_low": 1.1}, {"clip_high": -0.1}, {"clip_low": math.nan}])
def test_clip_bounds_are_checked(wrong):
    with pytest.raises(ValueError, match="Expected `clip_low`"):
        clipped_surrogate(*[torch.zeros(1, 1)] * 3, torch.ones(1, 1).bool(), **wrong)


def test_no_token_is_a_zero_loss_with_a_graph():
    policy_BT = torch.full((2, 3), torch.nan, requires_grad=True)
    nothing = torch.zeros(2, 3).bool()
    for how in ("token", "sequence", "constant"):
        loss, _ = clipped_surrogate(policy_BT, policy_BT, policy_BT, nothing, aggregate=how, constant_length=3)
        assert loss == 0
        assert denominator(nothing, how) == 0
        assert_close(torch.autograd.grad(loss, policy_BT)[0], torch.zeros(2, 3))


@seeds
@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_micro_batches_add_up_to_the_batch(seed, how):
    c = batch(seed)
    halves = slice(0, 5), slice(5, None)
    parts = [aggregate(c.values_BT[h], c.mask_BT[h], how, constant_length=7) for h in halves]
    assert_close(sum(parts), aggregate(c.values_BT, c.mask_BT, how, constant_length=7))
    assert sum(denominator(c.mask_BT[h], how) for h in halves) == denominator(c.mask_BT, how)


def test_aggregation_by_hand():
    loss_BT, mask_BT = (
        torch.tensor([[2.0, 4.0], [8.0, 99.0], [9.0, 9.0]]),
        torch.tensor([[1, 1], [1, 0], [0, 0]]).bool(),
    )
    means = [
        float(aggregate(loss_BT, mask_BT, how, constant_length=4) / denominator(mask_BT, how))
        for how in ("token", "sequence", "constant")
    ]
    assert means == pytest.approx([14 / 3, (3 + 8) / 2, 14 / 4 / 2])  # an empty response is no response
    # A constant loss of 1 is 1 however it is averaged, save for "constant", which is the mean length over L.
    ones = [
        float(aggregate(torch.ones(3, 2), mask_BT, how, 4) / denominator(mask_BT, how)) for how in ("token", "sequence")
    ]
    assert ones == [1.0, 1.0]


def test_aggregation_refuses():
    args = torch.zeros(1, 1), torch.ones(1, 1).bool()
    for length in (None, 0):
        with pytest.raises(ValueError, match="Expected a positive `constant_length`"):
            aggregate(*args, "constant", length)
    with pytest.raises(ValueError, match="got 'mean'"):
        aggregate(*args, "mean")
    with pytest.raises(ValueError, match="got 'mean'"):
        denominator(args[1], "mean")


@settings(max_examples=80, deadline=None)
@given(st.floats(-60, 0), st.floats(-60, 0))
def test_kl_estimators(policy, reference):
    one, two = torch.tensor([[policy]]), torch.tensor([[reference]])
    d = float(one - two)
    assert_close(float(kl(one, two, "k1")), d)
    assert_close(float(kl(one, two, "k2")), d * d / 2, rtol=1e-5, atol=1e-12)
    k3 = float(kl(one, two, "k3"))
    assert k3 >= 0
    if abs(d) < 20:
        assert k3 == pytest.approx(math.expm1(-d) + d, rel=1e-3, abs=1e-5)


def test_kl_estimators_have_the_right_mean_and_k2_the_right_gradient():
    logits = torch.tensor([0.5, -1.0, 0.2], requires_grad=True)
    policy_V, reference_V = logits.log_softmax(0), torch.tensor([-0.3, 0.4, 0.1]).log_softmax(0)
    weight_V = policy_V.detach().exp()  # the chance of sampling each token
    exact = (policy_V.exp() * (policy_V - reference_V)).sum()
    for estimator in ("k1", "k3"):
        estimate_V = kl(policy_V[None], reference_V[None], estimator)[0]
        assert_close((weight_V * estimate_V).sum(), exact)
    gradient = torch.autograd.grad(exact, logits, retain_graph=True)[0]
    sampled = {
        name: torch.autograd.grad(
            (weight_V * kl(policy_V[None], reference_V[None], name)[0]).sum(), logits, retain_graph=True
        )[0]
        for name in ("k1", "k2", "k3")
    }
    backwards = torch.autograd.grad((reference_V.exp() * (reference_V - policy_V)).sum(), logits)[0]
    assert_close(sampled["k2"], gradient)
    assert_close(sampled["k1"], torch.zeros(3), rtol=0, atol=1e-6)
    assert_close(sampled["k3"], backwards)


def test_kl_of_equal_models_is_zero_and_others_are_refused():
    logprobs_BT = -torch.rand(2, 3)
    for estimator in ("k1", "k2", "k3"):
        assert kl(logprobs_BT, logprobs_BT, estimator).abs().max() == 0
    with pytest.raises(ValueError, match="k1, k2 or k3, got 'full'"):
        kl(logprobs_BT, logprobs_BT, "full")


@seeds
def test_value_loss_follows_ppo(seed):
    c = batch(seed)
    total, clipped, squares = 0.0, 0, 0.0
    for i, tokens in enumerate(places(c.mask_BT)):
        for t in tokens:
            value, old, target = float(c.policy_BT[i, t]), float(c.proximal_BT[i, t]), float(c.values_BT[i, t])
            near = min(max(value, old - 0.3), old + 0.3)
            total += max((value - target) ** 2, (near - target) ** 2) / 2
            clipped += (near - target) ** 2 > (value - target) ** 2
            squares += (value - target) ** 2
    values_BT = c.policy_BT.clone().requires_grad_()
    loss, metrics = value_loss(values_BT, c.proximal_BT, c.values_BT, c.mask_BT, clip=0.3)
    assert_close(loss, torch.tensor(total))
    assert metrics["value/clip_fraction"] == clipped > 0
    assert_close(metrics["value/squared_error"], torch.tensor(squares))
    assert torch.autograd.grad(loss, values_BT)[0].isfinite().all()
    free, _ = value_loss(values_BT, c.proximal_BT, c.values_BT, c.mask_BT, clip=1e9)
    assert_close(free, torch.tensor(squares / 2))
    assert not any(value.requires_grad for value in metrics.values())


@seeds
@pytest.mark.parametrize("cap", [2.0, 0.5, None])
def test_importance_weight_is_a_capped_ratio(seed, cap):
    c = batch(seed)
    weight_BT, metrics = importance_weight(c.policy_BT.clone().requires_grad_(), c.proximal_BT, c.mask_BT, cap=cap)
    gaps = [float(c.policy_BT[i, t] - c.proximal_BT[i, t]) for i, row in enumerate(places(c.mask_BT)) for t in row]
    ratios = [math.exp(g) for g in gaps]
    weights = [min(r, cap) if cap else r for r in ratios]
    assert_close(weight_BT[c.mask_BT], torch.tensor(weights))
    assert weight_BT[~c.mask_BT].abs().sum() == 0
    assert not weight_BT.requires_grad
    expected = {
        "importance/weight": sum(weights),
        "importance/ratio": sum(ratios),
        "importance/capped": sum(w < r for w, r in zip(weights, ratios, strict=True)),
        "importance/ratio_below_half": sum(r < 0.5 for r in ratios),
        "importance/ratio_above_two": sum(r > 2 for r in ratios),
        "importance/abs_diff": sum(map(abs, gaps)),
        "importance/abs_diff_max": max(map(abs, gaps)),
        "importance/kl": sum(r - 1 - g for r, g in zip(ratios, gaps, strict=True)),
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-4)


def test_importance_weight_of_the_same_policy_is_one():
    logprobs_BT, mask_BT = -torch.rand(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(importance_weight(logprobs_BT, logprobs_BT, mask_BT)[0], mask_BT.float())
    with pytest.raises(ValueError, match="Expected `cap` above 0"):
        importance_weight(logprobs_BT, logprobs_BT, mask_BT, cap=0.0)


def test_drop_nonfinite_counts_only_tokens_of_the_mask():
    mask_BT = torch.tensor([[True, True, True, False]])
    one_BT, two_BT = (
        torch.tensor([[-1.0, -torch.inf, -1.0, torch.nan]]),
        torch.tensor([[-1.0, torch.nan, torch.inf, -1.0]]),
    )
    kept_BT, dropped = drop_nonfinite(mask_BT, one_BT, two_BT)
    assert kept_BT.tolist() == [[True, False, False, False]]
    assert dropped == 2
    loss, _ = clipped_surrogate(one_BT, two_BT, torch.ones(1, 4), kept_BT)
    assert loss == -1  # the one token left has ratio 1


@seeds
def test_whitened_advantages_make_a_zero_loss_on_policy(seed):
    c = batch(seed)
    loss, _ = clipped_surrogate(c.policy_BT, c.policy_BT, whiten(c.values_BT, c.mask_BT), c.mask_BT)
    assert abs(float(loss)) < 1e-4  # -sum of A, and A has mean 0
