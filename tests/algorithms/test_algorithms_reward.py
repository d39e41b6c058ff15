"""Process reward, its granularity and normalisation, and the gate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import batch
from torch.testing import assert_close

from prime_lightning.algorithms import (
    ProcessGate,
    normalise,
    process_reward,
    reinforce,
    reverse_cumsum,
    to_granularity,
)

seeds = pytest.mark.parametrize("seed", range(8))


def test_process_reward_by_hand():
    prm_BT = torch.tensor([[-1.0, -3.0, torch.nan]], requires_grad=True)
    reference_BT, mask_BT = torch.tensor([[-2.0, -2.5, 0.0]]), torch.tensor([[True, True, False]])
    reward_BT = process_reward(prm_BT, reference_BT, mask_BT, beta=0.05)
    assert_close(reward_BT, torch.tensor([[0.05, -0.025, 0.0]]))  # 0.05 * (1, -0.5)
    assert_close(torch.autograd.grad(reward_BT.sum(), prm_BT)[0], torch.tensor([[0.05, 0.05, 0.0]]))


def test_a_prm_that_equals_its_reference_rewards_nothing():
    logprobs_BT = torch.randn(3, 5)
    assert process_reward(logprobs_BT, logprobs_BT, torch.ones(3, 5).bool(), beta=1.0).abs().max() == 0


@seeds
@pytest.mark.parametrize("against", ["policy", "reference"])
def test_what_a_token_reward_teaches_by_itself(seed, against):
    """`E[sum_t A_t grad log pi(t)] = beta sum_s P(s) grad E_pi[log(prm / other)]` over prefixes s, `gamma_process: 0`.

    Where the policy is the other one, this is `-beta sum_s P(s) grad KL(pi || prm)`.
    """
    rng, beta, count = torch.Generator().manual_seed(seed), 0.3, 4
    first, second, prm_first, prm_second, reference_first, reference_second = (
        torch.randn(*shape, count, generator=rng, dtype=torch.float64).log_softmax(-1) for shape in [(), (count,)] * 3
    )
    logits = first.requires_grad_(), second.requires_grad_()
    pi = [x.log_softmax(-1) for x in logits]
    other = pi if against == "policy" else [reference_first, reference_second]

    def answers(tables):
        """Log-probs of every answer of two tokens, once."""
        return torch.stack([tables[0].repeat_interleave(count), tables[1].flatten()], 1)

    policy_BT, prm_BT, other_BT = answers(pi), answers([prm_first, prm_second]), answers(other)
    mask_BT, n = torch.ones(count**2, 2).bool(), count**2
    reward_BT = process_reward(prm_BT, other_BT.detach(), mask_BT, beta=beta)
    rows = mask_BT, torch.zeros(n).long(), torch.ones(n).bool()
    _, credit_BT = reinforce(torch.zeros(n), reward_BT, *rows, gamma_process=0.0)
    expected = (policy_BT.detach().sum(1).exp() * (policy_BT * credit_BT).sum(1)).sum()

    goal = (pi[0].exp() * (prm_first - other[0])).sum()
    goal = goal + (pi[0].detach().exp() * (pi[1].exp() * (prm_second - other[1])).sum(1)).sum()
    paid = torch.autograd.grad(expected, logits, retain_graph=True)
    for mine, theirs in zip(paid, torch.autograd.grad(beta * goal, logits), strict=True):
        assert_close(mine, theirs, atol=1e-6, rtol=1e-5)  # rewards are float32


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="Expected `beta` positive"):
        process_reward(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1).bool(), beta=beta)


def slow_steps(process_BT, mask_BT, step_ids_BT):
    out_BT = torch.zeros(mask_BT.shape)
    for i in range(len(mask_BT)):
        places = [t for t in range(mask_BT.shape[1]) if mask_BT[i, t]]
        for step in {int(step_ids_BT[i, t]) for t in places}:
            inside = [t for t in places if step_ids_BT[i, t] == step]
            out_BT[i, max(inside)] = sum(float(process_BT[i, t]) for t in inside)
    return out_BT


@seeds
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_steps_follow_the_definition(seed, dtype):
    c = batch(seed, invalid=False)
    rng = torch.Generator().manual_seed(seed)
    step_ids_BT = (torch.rand(c.mask_BT.shape, generator=rng) < 0.3).cumsum(1).to(dtype) - 1
    steps_BT = to_granularity(c.process_BT, c.mask_BT, "step", step_ids_BT)
    assert_close(steps_BT, slow_steps(c.process_BT, c.mask_BT, step_ids_BT))
    one_step_BT = to_granularity(c.process_BT, c.mask_BT, "response")
    assert_close(one_step_BT, slow_steps(c.process_BT, c.mask_BT, torch.zeros_like(step_ids_BT)))
    each_BT = torch.arange(c.mask_BT.shape[1]).expand_as(c.mask_BT)
    assert torch.equal(
        to_granularity(c.process_BT, c.mask_BT, "step", each_BT), torch.where(c.mask_BT, c.process_BT, 0)
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), how=st.sampled_from(["token", "step", "response"]))
def test_every_granularity_keeps_the_sum(seed, how):
    c = batch(seed)
    mask_BT = c.mask_BT & c.valid_B[:, None]
    step_ids_BT = torch.arange(mask_BT.shape[1]).expand_as(mask_BT) // 3
    paid_BT = to_granularity(c.process_BT, mask_BT, how, step_ids_BT)
    assert_close(paid_BT.sum(1), torch.where(mask_BT, c.process_BT, 0).sum(1), rtol=1e-5, atol=1e-5)
    assert paid_BT[~mask_BT].abs().sum() == 0


def test_granularity_with_an_empty_mask_and_wrong_arguments():
    x_BT, nothing = torch.ones(2, 3), torch.zeros(2, 3).bool()
    assert to_granularity(x_BT, nothing, "response").abs().sum() == 0
    with pytest.raises(ValueError, match="Expected `step_ids_BT`"):
        to_granularity(x_BT, ~nothing, "step")
    with pytest.raises(ValueError, match="token, step or response, got 'whole'"):
        to_granularity(x_BT, nothing, "whole")


@seeds
def test_normalise_bounds_the_returns(seed):
    c = batch(seed)
    mask_BT = c.mask_BT & c.valid_B[:, None]
    return_BT = reverse_cumsum(c.process_BT, mask_BT)
    largest = max(abs(float(x)) for x in return_BT[mask_BT])
    mean_square = sum(float(x) ** 2 for x in return_BT[mask_BT]) / int(mask_BT.sum())
    for how, expected in (("none", 1.0), ("batch_max", largest + 1e-6), ("batch_std", math.sqrt(mean_square) + 1e-6)):
        scaled_BT, scale = normalise(c.process_BT, mask_BT, how)
        assert_close(float(scale), expected, rtol=1e-5, atol=0)
        assert_close(scaled_BT, torch.where(mask_BT, c.process_BT, 0) / expected)


@seeds
@pytest.mark.parametrize("how", ["batch_max", "batch_std"])
def test_normalise_over_ranks_is_normalise_of_the_whole(seed, how):
    c = batch(seed)
    mask_BT = c.mask_BT & c.valid_B[:, None]
    expected_BT, scale = normalise(c.process_BT, mask_BT, how)
    square_BT = reverse_cumsum(c.process_BT, mask_BT) ** 2

    def all_reduce(tensor, op):  # the other rank holds rows 4 and on
        if op == "max":
            return torch.maximum(tensor, square_BT[4:].max().sqrt())
        return tensor + torch.stack([square_BT[4:].sum(), mask_BT[4:].sum().float()])

    own_BT, own_scale = normalise(c.process_BT[:4], mask_BT[:4], how, all_reduce=all_reduce)
    assert_close(own_scale, scale)
    assert_close(own_BT, expected_BT[:4])


def test_normalise_of_nothing_is_nothing():
    for how in ("none", "batch_max", "batch_std"):
        scaled_BT, scale = normalise(torch.full((2, 3), torch.nan), torch.zeros(2, 3).bool(), how)
        assert scaled_BT.abs().sum() == 0
        assert scale > 0
    with pytest.raises(ValueError, match="none, batch_max or batch_std, got 'batch_norm'"):
        normalise(torch.zeros(1, 1), torch.ones(1, 1).bool(), "batch_norm")


def test_gate_opens_once_the_prm_knows_something_and_closes_again():
    gate = ProcessGate(ramp=4, momentum=0.0)
    assert gate.weight == 0
    seen = [
        gate.update(ce, accuracy) for ce, accuracy in [(0.70, 0.6), (0.69, 0.5), (0.69, 0.6), (0.6, 0.7), (0.6, 0.7)]
    ]
    assert seen == [0, 0, 0.25, 0.5, 0.75]  # CE above log 2; accuracy not above one half; then the ramp
    assert [gate.update(0.6, 0.7), gate.update(0.6, 0.7)] == [1, 1]
    assert [gate.update(0.8, 0.7) for _ in range(5)] == [0.75, 0.5, 0.25, 0, 0]


def test_gate_waits_for_its_iteration():
    gate = ProcessGate(after=3)
    assert [gate.update(0.1, 1.0) for _ in range(5)] == [0, 0, 0, 1, 1]  # iterations 0, 1, 2 are closed


def test_gate_runs_on_running_means():
    gate = ProcessGate(momentum=0.5, max_ce=0.5)
    assert gate.update(0.9, 0.9) == 0  # mean CE 0.9
    assert gate.update(0.3, 0.9) == 0  # 0.6
    assert gate.update(0.3, 0.9) == 1  # 0.45
    assert gate.update(0.5, 0.9) == 1  # 0.475
    assert gate.ce == pytest.approx(0.475)


def test_gate_without_pairs_and_with_a_broken_prm():
    gate = ProcessGate(momentum=0.0)
    assert [gate.update(0.1, None), gate.update(0.1, math.nan)] == [0, 0]  # accuracy never measured
    assert [gate.update(0.1, 0.9), gate.update(0.1, None)] == [1, 1]  # it is remembered
    assert gate.update(math.nan, 0.9) == 0
    assert gate.ce == pytest.approx(0.1)
    assert gate.update(math.inf, 0.9) == 0
    blind = ProcessGate(max_ce=None, min_accuracy=0.0)
    assert blind.update(9.0, None) == 1


def test_gate_resumes_where_it_was():
    measured = [(0.8, 0.4), (0.6, 0.8), (0.6, None), (0.5, 0.9), (0.9, 0.2), (0.2, 0.9)]
    whole, first, second = (ProcessGate(after=1, ramp=3, momentum=0.5) for _ in range(3))
    for ce, accuracy in measured[:3]:
        first.update(ce, accuracy)
    second.load_state_dict(first.state_dict())
    weights = [whole.update(*m) for m in measured]
    assert [second.update(*m) for m in measured[3:]] == weights[3:]
    assert second.state_dict() == whole.state_dict()
    assert len(set(weights)) > 2


@pytest.mark.parametrize(
    "wrong",
    [{"after": -1}, {"max_ce": 0.0}, {"min_accuracy": 1.0}, {"ramp": 0}, {"momentum": 1.0}, {"max_ce": math.nan}],
)
def test_gate_refuses(wrong):
    with pytest.raises(ValueError, match=f"Expected gate `{next(iter(wrong))}`"):
        ProcessGate(**wrong)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 2), st.none() | st.floats(0, 1)), max_size=30),
    st.integers(1, 5),
    st.integers(0, 4),
)
def test_gate_moves_by_one_step_at_most(measured, ramp, after):
    gate = ProcessGate(after=after, ramp=ramp)
    before = gate.weight
    for i, (ce, accuracy) in enumerate(measured):
        weight = gate.update(ce, accuracy)
        assert 0 <= weight <= 1
        assert abs(weight - before) <= 1 / ramp + 1e-9
        assert weight == 0 or i >= after
        before = weight
