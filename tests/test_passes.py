"""The passes over the rollouts that an iteration makes, counted; docs/concepts.md lists them."""

from collections import Counter

import pytest
import tiny
import torch

from prime_lightning.options import PolicyLoss, ProcessReward, Update

FULL = {"policy without gradient": 1, "prm without gradient": 1, "reference without gradient": 1, "policy": 1, "prm": 1}
LESS = "policy without gradient", "reference without gradient"


def passes(model, tmp_path, **options):
    """Rows that each model saw, over the rows of the iteration; of the second of two iterations."""
    update = Update(minibatches=2)
    settings = {"prm": str(model), "reference": str(model), "policy_update": update, "prm_update": update}
    prime, seen = tiny.module(model, **(settings | options)), Counter()

    def watch(role):
        def count(module, inputs, output):
            seen[role if torch.is_grad_enabled() else f"{role} without gradient"] += len(inputs[0])

        return count

    configure = prime.configure_model

    def configured():
        configure()
        for role in ("policy", "prm", "reference"):
            if getattr(prime, role) is not None:
                getattr(prime, role).register_forward_hook(watch(role))

    prime.configure_model = configured
    before = []
    start = tiny.pl.callbacks.LambdaCallback(on_train_batch_start=lambda *_: before.append(seen.copy()))
    history = tiny.fit(tmp_path, prime, tiny.data(model), 2, callbacks=[tiny.Outputs(), start])
    rows = len(history.outputs[-1]["batch"])
    return {role: count / rows for role, count in (seen - before[-1]).items()}


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"process_reward": ProcessReward(second_look=0)}, ()),
        ({"process_reward": ProcessReward(second_look=0), "policy_loss": PolicyLoss(proximal="engine")}, LESS[:1]),
        ({"process_reward": ProcessReward(second_look=0), "reference": None}, LESS[1:]),
        (
            {
                "process_reward": ProcessReward(second_look=0),
                "reference": None,
                "policy_loss": PolicyLoss(proximal="engine"),
            },
            LESS,
        ),
        (
            {"prm": None, "reference": None, "policy_loss": PolicyLoss(proximal="engine")},
            (*LESS, *list(FULL)[1:2], "prm"),
        ),
    ],
    ids=["default", "engine", "policy_reference", "both", "outcome_only"],
)
def test_an_iteration_makes_these_passes_and_no_more(warm_model, tmp_path, options, left_out):
    assert passes(warm_model, tmp_path, **options) == {role: n for role, n in FULL.items() if role not in left_out}


def test_a_second_look_is_one_more_pass_of_the_prm(warm_model, tmp_path):
    found = passes(warm_model, tmp_path, process_reward=ProcessReward(second_look=1))
    assert found == FULL | {"prm without gradient": 2}


def test_the_ratio_starts_from_what_the_engine_said(warm_model, tmp_path):
    """One update: with engine and trainer of the same arithmetic both ways train alike."""
    rows = {}
    for proximal in ("trainer", "engine"):
        prime = tiny.module(warm_model, policy_loss=PolicyLoss(proximal=proximal))
        rows[proximal] = tiny.fit(tmp_path / proximal, prime, tiny.data(warm_model), 3).rows
    for a, b in zip(rows["trainer"], rows["engine"], strict=True):
        assert a["policy/loss"] == pytest.approx(b["policy/loss"], abs=1e-4)
        assert a["policy/grad_norm"] == pytest.approx(b["policy/grad_norm"], rel=1e-3)
        assert b["importance/abs_diff"] == 0.0


def test_an_engine_of_another_model_is_found_out_either_way(warm_model, sharp_folder, tmp_path):
    data = tiny.data(warm_model)
    load = data.engine.load_weights

    def deaf(weights, version):
        load(((name, torch.zeros_like(weight)) for name, weight in weights), version)

    data.engine.load_weights = deaf
    with pytest.raises(ValueError, match="Expected the engine's log-probs of the first batch to be the policy's"):
        tiny.fit(tmp_path, tiny.module(warm_model, policy_loss=PolicyLoss(proximal="engine")), data, 1)
