"""Objectives of other trainers in whole iterations: overlays with and without PRM, packed rows, shaped outcomes."""

import math
from pathlib import Path

import pytest
import tiny
import torch

from prime_lightning import algorithms as alg
from prime_lightning.cli.lightning_cli import PrimeCLI
from prime_lightning.models.options import Loading
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.options import PolicyLoss, Update

CONF = Path(__file__).parents[2] / "conf"
OBJECTIVES = ("cispo", "dapo", "dr_grpo", "gspo")


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def built(folder, model, *overlays):
    """The quickstart with these layers, small, and with a gate that is open from the start."""
    layers = [word for name in ("quickstart.yaml", *overlays) for word in ("--config", str(CONF / name))]
    small = ["--data.prompts_per_batch=8", "--data.sampling.max_tokens=8", "--data.train.init_args.operations=2"]
    quick = ["--trainer.callbacks=[]", "--trainer.max_steps=2", "--data.validation=null"]
    steps = ["--model.policy_update={minibatches: 2, micro_tokens: 256}", "--data.check_answers=false"]
    gate = ["--model.gate.init_args={after: 0, max_ce: null, min_accuracy: 0.0}"]
    where = ["--trainer.default_root_dir", str(folder), "--model.policy", str(model)]
    cache = ["--model.outcome_shaping.init_args.cache=2"] if "ablation/dapo.yaml" in overlays else []
    args = [*layers, *where, *small, *quick, *steps, *gate, *cache]
    return PrimeCLI(PrimeModule, RolloutDataModule, args, run=False)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("more", [(), ("ablation/no_prm.yaml",)], ids=["process_reward", "outcome_only"])
def test_the_overlay_trains(warm_model, tmp_path, name, more):
    cli = built(tmp_path, warm_model, f"ablation/{name}.yaml", *more)
    prime, history = cli.model, tiny.History()
    prime.configure_model()
    before = weights(prime.policy)
    cli.trainer.loggers = [*cli.trainer.loggers, history]
    cli.trainer.fit(prime, cli.datamodule)
    assert len(history.rows) == 2
    assert all(math.isfinite(value) for row in history.rows for key, value in row.items() if key != "prm/auc")
    assert max(float((p - before[n]).abs().max()) for n, p in prime.policy.named_parameters()) > 1e-6
    assert [row.get("process/weight") for row in history.rows] == ([None, None] if more else [1.0, 1.0])
    assert ("train/shaping" in history.rows[0]) is (name == "dapo")


@pytest.mark.parametrize("surrogate", [alg.gspo, alg.cispo])
def test_the_surrogate_does_not_depend_on_how_rows_are_cut_and_packed(warm_model, tmp_path, surrogate):
    """Micro-batches of few responses, or packed rows that share prompts: a sequence has one ratio."""
    rows = []
    loss = PolicyLoss(
        surrogate=surrogate, aggregate="sequence", importance_per="sequence", clip_low=0.02, clip_high=0.03
    )
    for loading, tokens in ((Loading(), 10**6), (Loading(), 40), (Loading(attention="varlen", packed=True), 60)):
        update = Update(minibatches=2, epochs=2, micro_tokens=tokens)
        prime = tiny.module(warm_model, loading=loading, policy_loss=loss, policy_update=update)
        rollouts = tiny.data(warm_model)
        rollouts.verifiers.submit = tiny.parity
        rows.append(tiny.fit(tmp_path, prime, rollouts, 2).rows)
    whole, *others = rows
    assert 0 < whole[0]["policy/clip_fraction"] < 1  # the policy moves between minibatches
    for cut in others:
        for row, other in zip(whole, cut, strict=True):
            assert row.keys() == other.keys()
            assert all(other[k] == pytest.approx(row[k], rel=2e-3, abs=2e-4, nan_ok=True) for k in row)


def test_a_penalty_reaches_advantages_and_no_label(warm_model, tmp_path):
    """The PRM learns the same to the last bit; the policy's outcome credit is that of the shaped rewards."""
    learned, outputs = [], []
    for shaping in (None, alg.OverlongPenalty(max_tokens=8, cache=8)):
        prime = tiny.module(warm_model, outcome_shaping=shaping, gate=alg.ProcessGate(after=9))
        history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 1)
        learned.append(weights(prime.prm))
        outputs.append(history.outputs[0])
    plain, shaped = outputs
    batch = shaped.batch
    assert all(torch.equal(learned[0][name], learned[1][name]) for name in learned[0])
    assert torch.equal(plain.batch.outcome_B, batch.outcome_B)
    assert set(batch.outcome_B.tolist()) == {0.0, 1.0}
    reward = [float(o) - 0.5 * int(n) / 8 for o, n in zip(batch.outcome_B, batch.response_length_B, strict=True)]
    for i in range(len(batch)):
        others = [reward[j] for j in range(len(batch)) if j != i and batch.group_B[j] == batch.group_B[i]]
        expected = reward[i] - sum(others) / len(others)
        assert float(shaped.advantage_BT[i, 0]) == pytest.approx(expected, abs=1e-5)
    mean = sum(r - float(o) for r, o in zip(reward, batch.outcome_B, strict=True)) / len(batch)
    assert shaped.metrics["train/shaping"] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"aggregate": "constant"}, "Expected `policy_loss.constant_length` with `aggregate: constant`, got none"),
        (
            {"importance_floor": 3.0},
            r"Expected `policy_loss.importance_floor` .* below `importance_cap` \(2.0\), got 3.0",
        ),
    ],
)
def test_the_loss_is_checked_before_anything_is_sampled(wrong, words):
    with pytest.raises(ValueError, match=words):
        PolicyLoss(**wrong)
