"""Every weight of the credit counts, for every estimator, through the module; and a broken PRM pays nothing."""

import math
import warnings

import pytest
import tiny
import torch
from torch.testing import assert_close

from prime_lightning import algorithms as alg
from prime_lightning.training.callbacks.alarms import Alarms
from prime_lightning.training.options import Credit, PolicyLoss, ProcessReward, Update

ESTIMATORS = [alg.rloo, alg.rloo_official, alg.rloo_printed, alg.grpo, alg.reinforce, alg.gae]
everyone = pytest.mark.parametrize("estimate", ESTIMATORS)
OPEN = {"max_ce": None, "min_accuracy": 0.0}


def fit(model, folder, steps=1, *callbacks, gate=OPEN, temperature=1.0, **options):
    """A run whose PRM learns before its rewards are read, so that they are not zero; outcomes are a coin's."""
    data = tiny.data(model, sampling=tiny.Sampling(samples=4, max_tokens=8, temperature=temperature))
    data.verifiers.submit = tiny.parity
    reward = ProcessReward(beta=0.5, update="before")
    prime = tiny.module(model, gate=alg.ProcessGate(**gate), **({"process_reward": reward} | options))
    history = tiny.History()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.trainer(folder, steps, *callbacks, history=history).fit(prime, data)
    return prime, history


def advantage(model, folder, estimate, gate=OPEN, **options):
    """Of the first iteration, whose rollouts and process rewards do not depend on the weights."""
    critic = {"critic": str(model)} if estimate is alg.gae else {}
    _, history = fit(model, folder, gate=gate, advantage=estimate, **critic, **options)
    return history.outputs[0].advantage_BT


@everyone
def test_process_weight_and_the_gates_ramp_are_live(model_folder, tmp_path, estimate):
    def process(gate=OPEN, **weights):
        return advantage(model_folder, tmp_path, estimate, gate, credit=Credit(**weights)) - without_BT

    without_BT = advantage(model_folder, tmp_path, estimate, credit=Credit(process_weight=0.0))
    whole_BT = process()
    assert whole_BT.abs().max() > 1e-3
    assert_close(process(process_weight=0.1), 0.1 * whole_BT, rtol=1e-3, atol=1e-5)
    assert_close(process({"ramp": 4, **OPEN}), 0.25 * whole_BT, rtol=1e-3, atol=1e-5)
    doubled_BT = process(outcome_weight=2.0) - whole_BT  # what the outcome adds once more
    if estimate is not alg.gae:  # whose critic is the baseline of the weighted sum
        assert_close(doubled_BT, without_BT, rtol=1e-3, atol=1e-5)


@everyone
def test_the_weight_of_a_kl_penalty_is_live(model_folder, sharp_folder, tmp_path, estimate):
    def penalty(weight):
        loss = PolicyLoss(kl="reward", kl_weight=weight, kl_estimator="k1")
        options = {"policy_loss": loss, "reference": str(sharp_folder)}
        return advantage(model_folder, tmp_path, estimate, credit=Credit(process_weight=0.0), **options)

    none_BT, one_BT, two_BT = (penalty(weight) for weight in (0.0, 0.01, 0.02))
    assert (one_BT - none_BT).abs().max() > 1e-3
    assert_close(two_BT - none_BT, 2 * (one_BT - none_BT), rtol=1e-3, atol=1e-5)


def test_the_critic_learns_the_return_of_the_mixed_reward(model_folder, tmp_path):
    """With lambda 1 its target is w_o o + w_p (return of the process reward), whatever it says now."""
    targets, returns = [], alg.gae_returns

    def seen(advantage_BT, values_BT, mask_BT):
        targets.append(returns(advantage_BT, values_BT, mask_BT))
        return targets[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alg, "gae_returns", seen)
        options = {"critic": str(model_folder), "advantage": alg.gae}
        credit = Credit(outcome_weight=2.0, process_weight=0.5)
        _, history = fit(model_folder, tmp_path, 2, credit=credit, critic_optimizer=tiny.adam(1e-2), **options)
    out = history.outputs[1]  # the critic has learned something by then
    batch, process_BT = out.batch, out.process_BT
    expected_BT = 2.0 * batch.outcome_B[:, None] + 0.5 * process_BT.flip(1).cumsum(1).flip(1)
    assert_close(targets[1][batch.mask_BT], expected_BT[batch.mask_BT], rtol=1e-4, atol=1e-5)


def test_a_critic_without_outcome_is_refused(model_folder):
    with pytest.raises(ValueError, match=r"`credit\.outcome_weight` above 0 with a critic, got 0"):
        tiny.module(model_folder, critic=model_folder, advantage=alg.gae, credit=Credit(outcome_weight=0.0))


def total(outcome_B, process_BT, mask_BT, group_B, valid_B, **options):
    return outcome_B[:, None] * mask_BT


def test_an_estimator_of_one_sum_is_told_what_is_expected(model_folder, tmp_path):
    with pytest.raises(ValueError, match="return two tensors"):
        fit(model_folder, tmp_path, advantage=total)


@pytest.mark.parametrize("update", ["before", "after"])
@pytest.mark.parametrize("worth", [math.nan, math.inf])
@pytest.mark.parametrize("gate", [{"after": 99}, {"ramp": 3, **OPEN}], ids=["closed", "open"])
def test_a_broken_prm_pays_nothing_and_the_run_goes_on_by_outcomes(model_folder, tmp_path, worth, gate, update):
    class Breaks(tiny.pl.Callback):
        """After the first iteration the PRM gives numbers that are not finite."""

        def on_train_batch_start(self, trainer, prime, *_):
            if trainer.global_step == 1:
                prime.prm.register_forward_hook(lambda _, __, out: (out[0] + worth, *out[1:]))

    reward = ProcessReward(beta=0.5, update=update)
    prime, history = fit(model_folder, tmp_path, 6, Breaks(), alarms := Alarms(), gate=gate, process_reward=reward)
    rows = [row for row in history.rows if "process/weight" in row]
    assert prime.trainer.global_step == len(rows) == 6
    assert [row["process/weight"] for row in rows[1:]] == [0] * 5
    assert [row["prm/nonfinite_tokens"] > 0 for row in rows] == [False] + [True] * 5
    assert sum(row["policy/skipped_steps"] for row in rows) == 0
    assert "broken_prm" in alarms.rung
    assert prime.gate.closed == math.isnan(worth)  # then its gradient was never finite again
    for out in history.outputs[1:]:
        batch = out.batch
        rows_ = batch.mask_BT, batch.group_B, batch.valid_B
        assert torch.equal(out.advantage_BT, alg.rloo(batch.outcome_B, None, *rows_)[0])
        assert out.process_BT is None


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("kl", ["none", "loss", "reward"])
def test_a_policy_that_is_its_reference_has_no_kl_at_any_temperature(sharp_folder, tmp_path, kl, temperature):
    loss = PolicyLoss(kl=kl, kl_weight=0.1)
    options = {"reference": str(sharp_folder), "policy_loss": loss, "policy_update": Update(minibatches=1)}
    _, history = fit(sharp_folder, tmp_path, temperature=temperature, credit=Credit(process_weight=0.0), **options)
    assert abs(history.rows[0]["policy/reference_kl"]) < 1e-6
    batch = history.outputs[0].batch
    plain_BT, _ = alg.rloo(batch.outcome_B, None, batch.mask_BT, batch.group_B, batch.valid_B)
    assert_close(history.outputs[0].advantage_BT, plain_BT, rtol=0, atol=1e-5)
