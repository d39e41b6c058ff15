"""GSPO, CISPO, importance weights of sequences, the overlong penalty: plain loops, and what they are at the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import batch
from torch.testing import assert_close

from prime_lightning.algorithms import (
    OverlongPenalty,
    aggregate,
    cispo,
    clipped_surrogate,
    denominator,
    gspo,
    importance_weight,
)

seeds = pytest.mark.parametrize("seed", range(6))
SURROGATES = [clipped_surrogate, gspo, cispo]
everyone = pytest.mark.parametrize("surrogate", SURROGATES)
some_batch = [settings(max_examples=30, deadline=None), given(seed=st.integers(0, 10**6))]


def drawn(test):
    for decorate in reversed(some_batch):
        test = decorate(test)
    return test


def places(mask_BT):
    return [[t for t in range(mask_BT.shape[1]) if mask_BT[i, t]] for i in range(len(mask_BT))]


def of_sequences(c):
    """The advantage of each response's first column on all of its tokens."""
    return c.values_BT.nan_to_num()[:, :1].expand_as(c.mask_BT)


def gradient(surrogate, c, advantage_BT, **options):
    policy_BT = c.policy_BT.clone().requires_grad_()
    loss, metrics = surrogate(policy_BT, c.proximal_BT, advantage_BT, c.mask_BT, **options)
    return loss.detach(), torch.autograd.grad(loss, policy_BT)[0], metrics


@seeds
def test_gspo_is_eq_5_of_its_paper(seed):
    """`1/G sum_i min(s_i A_i, clip(s_i) A_i)` by loops, whose gradient autograd takes through `s_i` itself."""
    c, low, high = batch(seed), 0.05, 0.2
    advantage_BT = of_sequences(c)
    policy_BT = c.policy_BT.double().requires_grad_()
    total, clipped = torch.zeros((), dtype=torch.float64), 0
    for i, tokens in enumerate(places(c.mask_BT)):
        if tokens:
            ratio = ((policy_BT[i, tokens] - c.proximal_BT[i, tokens].double()).sum() / len(tokens)).exp()
            advantage = float(advantage_BT[i, 0])
            free, bounded = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
            total = total - torch.minimum(free, bounded)
            clipped += len(tokens) * bool(bounded < free)
    loss, gradient_BT, metrics = gradient(gspo, c, advantage_BT, clip_low=low, clip_high=high)
    assert_close(loss, total.detach().float())
    assert_close(gradient_BT, torch.autograd.grad(total, policy_BT)[0].float().nan_to_num(), rtol=1e-4, atol=1e-5)
    assert metrics["policy/clip_fraction"] == clipped > 0


@seeds
def test_gspo_gives_each_token_its_own_advantage(seed):
    """The token form, Eq. 13: inside the clip the gradient of a token is `s_i A_t / |y_i|`."""
    c = batch(seed)
    _, gradient_BT, _ = gradient(gspo, c, c.values_BT, clip_low=1.0, clip_high=1e9)
    for i, tokens in enumerate(places(c.mask_BT)):
        if tokens:
            ratio = math.exp(sum(float(c.policy_BT[i, t] - c.proximal_BT[i, t]) for t in tokens) / len(tokens))
            assert_close(gradient_BT[i, tokens], -ratio * c.values_BT[i, tokens] / len(tokens), rtol=1e-4, atol=1e-5)


@drawn
def test_gspo_of_one_token_is_the_clipped_surrogate(seed):
    c = batch(seed, length=1)
    bounds = {"clip_low": 0.1, "clip_high": 0.3, "aggregate": "token"}
    (loss, gradient_BT, metrics), (other, other_BT, others) = (
        gradient(surrogate, c, c.values_BT, **bounds) for surrogate in (gspo, clipped_surrogate)
    )
    assert_close(loss, other)
    assert_close(gradient_BT, other_BT)
    assert_close(metrics, others)


@seeds
def test_cispo_by_loops(seed):
    c, low, high = batch(seed), 0.3, 0.5
    expected_BT, total, clipped = torch.zeros(c.mask_BT.shape), 0.0, 0
    for i, tokens in enumerate(places(c.mask_BT)):
        for t in tokens:
            ratio, advantage = math.exp(float(c.policy_BT[i, t] - c.proximal_BT[i, t])), float(c.values_BT[i, t])
            weight = min(max(ratio, 1 - low), 1 + high)
            expected_BT[i, t], clipped = -weight * advantage, clipped + (weight != ratio)
            total -= weight * advantage * float(c.policy_BT[i, t])
    loss, gradient_BT, metrics = gradient(cispo, c, c.values_BT, clip_low=low, clip_high=high)
    assert_close(gradient_BT, expected_BT, rtol=1e-4, atol=1e-5)
    assert_close(loss, torch.tensor(total), rtol=1e-4, atol=1e-4)
    assert metrics["policy/clip_fraction"] == clipped > 0


@drawn
def test_inside_its_clip_cispo_is_the_clipped_surrogate(seed):
    c = batch(seed)
    bounds = {"clip_low": 1.0, "clip_high": 1e6}
    expected_BT = gradient(clipped_surrogate, c, c.values_BT, **bounds)[1]
    assert_close(gradient(cispo, c, c.values_BT, **bounds)[1], expected_BT, rtol=1e-4, atol=1e-5)


@everyone
@drawn
def test_at_ratio_1_every_surrogate_is_the_policy_gradient(surrogate, seed):
    c = batch(seed)
    c.proximal_BT = c.policy_BT
    _, gradient_BT, metrics = gradient(surrogate, c, c.values_BT, aggregate="token")
    assert_close(gradient_BT, torch.where(c.mask_BT, -c.values_BT, 0.0))  # REINFORCE; no NaN from other tokens
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/ratio"] == c.mask_BT.sum()


@everyone
@drawn
def test_micro_batches_of_whole_responses_add_up(surrogate, seed):
    """In any order and parts, since a row is a whole response."""
    c = batch(seed)
    weight_BT = torch.rand(c.mask_BT.shape, generator=torch.Generator().manual_seed(seed))
    whole, _, metrics = gradient(surrogate, c, c.values_BT, weight_BT=weight_BT)
    columns = c.policy_BT, c.proximal_BT, c.values_BT, c.mask_BT
    order = torch.randperm(len(c.mask_BT), generator=torch.Generator().manual_seed(seed))
    parts = [surrogate(*(x[rows] for x in columns), weight_BT=weight_BT[rows]) for rows in order.split(5)]
    assert_close(sum(loss for loss, _ in parts), whole)
    assert_close({name: sum(one[name] for _, one in parts) for name in metrics}, metrics)


@everyone
def test_bounds_are_checked_and_nothing_is_nothing(surrogate):
    nothing_BT, policy_BT = torch.zeros(2, 3).bool(), torch.full((2, 3), torch.nan, requires_grad=True)
    loss, _ = surrogate(policy_BT, policy_BT, policy_BT, nothing_BT)
    assert loss == 0
    assert_close(torch.autograd.grad(loss, policy_BT)[0], torch.zeros(2, 3))
    for wrong in ({"clip_low": -0.1}, {"clip_low": 1.1}, {"clip_high": -0.1}):
        with pytest.raises(ValueError, match="Expected `clip_low`"):
            surrogate(policy_BT, policy_BT, policy_BT, nothing_BT, **wrong)


@seeds
def test_dr_grpo_weighs_tokens_alike_whatever_their_response(seed):
    """`1/G sum_i sum_t l_it / L`: Eq. of section 3.2, by loops."""
    c, longest = batch(seed), 7
    rows = [tokens for tokens in places(c.mask_BT) if tokens]
    total = sum(float(c.values_BT[i, t]) for i, tokens in enumerate(places(c.mask_BT)) for t in tokens) / longest
    mean = aggregate(c.values_BT, c.mask_BT, "constant", longest) / denominator(c.mask_BT, "constant")
    assert_close(mean, torch.tensor(total / len(rows)))


@seeds
@pytest.mark.parametrize("per", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("beyond", ["truncate", "mask"])
def test_importance_weights_by_loops(seed, per, beyond):
    c, floor, cap = batch(seed), 0.5, 1.5
    weight_BT, metrics = importance_weight(
        c.policy_BT, c.proximal_BT, c.mask_BT, cap=cap, floor=floor, per=per, beyond=beyond
    )
    expected_BT, changed = torch.zeros(c.mask_BT.shape), 0
    for i, tokens in enumerate(places(c.mask_BT)):
        gaps = {t: float(c.policy_BT[i, t] - c.proximal_BT[i, t]) for t in tokens}
        for t in tokens:
            of_row = sum(gaps.values()) / (len(tokens) if per == "sequence_mean" else 1)
            ratio = math.exp(gaps[t] if per == "token" else of_row)
            inside = floor <= ratio <= cap
            changed += not inside
            expected_BT[i, t] = ratio if inside else 0.0 if beyond == "mask" else min(max(ratio, floor), cap)
    assert_close(weight_BT, expected_BT, rtol=1e-4, atol=1e-5)
    assert metrics["importance/capped"] == changed > 0
    assert_close(metrics["importance/weight"], expected_BT.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per", ["token", "sequence", "sequence_mean"])
@drawn
def test_between_equal_policies_masks_leave_nothing_out(per, seed):
    c = batch(seed)
    both = [
        importance_weight(c.policy_BT, c.policy_BT, c.mask_BT, cap=1.01, floor=0.99, per=per, beyond=beyond)
        for beyond in ("truncate", "mask")
    ]
    assert all(torch.equal(weight_BT, c.mask_BT.float()) for weight_BT, _ in both)
    assert both[0][1] == both[1][1]


@drawn
def test_of_one_token_all_weights_are_the_same(seed):
    c = batch(seed, length=1)
    weights = [
        importance_weight(c.policy_BT, c.proximal_BT, c.mask_BT, per=per)[0]
        for per in ("token", "sequence", "sequence_mean")
    ]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_a_product_beyond_all_bounds_stays_finite():
    policy_BT, mask_BT = torch.full((1, 50), 9.0), torch.ones(1, 50).bool()
    weight_BT, metrics = importance_weight(policy_BT, -policy_BT, mask_BT, cap=None, per="sequence")
    assert weight_BT.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"floor": 2.0}, "Expected `floor`"), ({"per": "word"}, "got 'word'"), ({"beyond": "drop"}, "and 'drop'")],
)
def test_importance_weight_refuses(wrong, words):
    with pytest.raises(ValueError, match=words):
        importance_weight(*[torch.zeros(1, 1)] * 2, torch.ones(1, 1).bool(), **wrong)


@settings(max_examples=60, deadline=None)
@given(cache=st.integers(1, 20), length=st.integers(0, 40), weight=st.floats(0, 2), outcome=st.sampled_from([0.0, 1.0]))
def test_overlong_penalty_is_eq_13_of_dapo(cache, length, weight, outcome):
    longest = 20
    if length <= longest - cache:
        penalty = 0.0
    elif length <= longest:
        penalty = ((longest - cache) - length) / cache
    else:
        penalty = -1.0
    shaping = OverlongPenalty(max_tokens=longest, cache=cache, weight=weight)
    got = shaping(torch.tensor([outcome]), torch.tensor([length]))
    assert_close(got, torch.tensor([outcome + weight * penalty]))


@pytest.mark.parametrize("wrong", [{"cache": 0}, {"cache": 21}, {"cache": 4, "weight": -1.0}])
def test_overlong_penalty_refuses(wrong):
    with pytest.raises(ValueError, match=r"Expected `(cache|weight)`"):
        OverlongPenalty(max_tokens=20, **wrong)
