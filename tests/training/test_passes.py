"""The passes over the rollouts that an iteration makes, counted; docs/concepts.md lists them."""

from collections import Counter

import pytest
import tiny
import torch

from prime_lightning import algorithms as alg
from prime_lightning.models.options import Loading
from prime_lightning.rollout import Sampling, Verdict
from prime_lightning.training.learning import PRMLearner
from prime_lightning.training.options import PolicyLoss, Probe, ProcessReward, Replaying, Update
from prime_lightning.verifiers import Verifiers

FULL = {"policy without gradient": 1, "prm without gradient": 1, "reference without gradient": 1, "policy": 1, "prm": 1}
LESS = "policy without gradient", "reference without gradient"


def passes(model, tmp_path, minibatches=2, data=None, iteration=1, **options):
    """Rows that each model saw, over the rows of the iteration; of the second of two iterations, or the first."""
    update = Update(minibatches=minibatches)
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
    history = tiny.fit(tmp_path, prime, data or tiny.data(model), iteration + 1, callbacks=[tiny.Outputs(), start])
    rows = len(history.outputs[-1].batch)
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


QUIET = ProcessReward(second_look=0)
ONE_STEP = {"policy": 1, "prm": 1}
OWN = "policy without gradient"


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, ["reference without gradient"]),
        ({"reference": None}, [OWN]),
        ({"reference": None, "policy_loss": PolicyLoss(proximal="engine")}, []),
        ({"policy_loss": PolicyLoss(kl="loss")}, ["reference without gradient"]),
        ({"policy_loss": PolicyLoss(kl="reward")}, ["reference without gradient", OWN]),
        ({"process_reward": ProcessReward(second_look=1)}, ["reference without gradient", "prm without gradient"]),
        (
            {"process_reward": ProcessReward(second_look=0, update="before")},
            ["reference without gradient", "prm without gradient"],
        ),
        ({"policy_update": Update(minibatches=1, epochs=2)}, ["reference without gradient", OWN, "policy"]),
    ],
    ids=["default", "policy_reference", "engine", "kl_loss", "kl_reward", "second_look", "before", "two_epochs"],
)
def test_where_one_step_is_all_its_own_forward_says_what_came_before(warm_model, tmp_path, options, more):
    found = passes(warm_model, tmp_path, minibatches=1, **({"process_reward": QUIET} | options))
    assert found == ONE_STEP | {role: 1 + (role in ONE_STEP) for role in more}


def test_outcomes_in_one_step_take_one_pass(warm_model, tmp_path):
    data = tiny.data(warm_model, sampling=Sampling(samples=4, max_tokens=8, temperature=0.7))
    options = {"prm": None, "reference": None, "data": data}
    assert passes(warm_model, tmp_path, minibatches=1, **options) == {"policy": 1}


def test_the_first_batch_takes_one_more_to_compare_engine_and_policy(warm_model, tmp_path):
    first = {"prm": None, "reference": None, "iteration": 0}
    assert passes(warm_model, tmp_path, minibatches=1, **first) == {"policy": 1, OWN: 1}


class Parity(Verifiers):
    """By an even checksum; from a certain prompt on all is right."""

    def __init__(self, until):
        super().__init__()
        self.until = until

    def submit(self, prompt, text):
        given = tiny.parity(prompt, text)
        if prompt.draw >= self.until:
            given = type(given)()
            given.set_result(Verdict.of_score(1.0))
        return given


def rows_and_weights(model, folder, own, monkeypatch, until=99, **options):
    """Three iterations of one optimizer step each, whose starting log-probs its own passes give, or passes before."""
    with monkeypatch.context() as patched:
        if not own:
            patched.setattr(PolicyLoss, "in_one_pass", lambda *_: False)
            patched.setattr(PRMLearner, "goes_first", False)
        update = Update(minibatches=1, micro_tokens=128)
        torch.manual_seed(0)
        prime = tiny.module(model, reference=str(model), policy_update=update, prm_update=update, **options)
        rows = tiny.fit(folder, prime, tiny.data(model, verifiers=Parity(until)), 3).rows
    return rows, {f"{role}.{n}": p for role in ("policy", "prm") for n, p in getattr(prime, role).named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"process_reward": ProcessReward(beta=0.5)},
        {"process_reward": ProcessReward(beta=0.5, replay=Replaying(iterations=2)), "prm_loss": alg.dpo},
        {"policy_loss": PolicyLoss(kl="loss", kl_weight=0.1, importance_cap=None, aggregate="sequence")},
        {"policy_loss": PolicyLoss(entropy_weight=0.01), "loading": Loading(attention="varlen", packed=True)},
    ],
    ids=["plain", "replay_dpo", "kl", "entropy_packed"],
)
def test_own_passes_learn_what_passes_before_them_teach(warm_model, tmp_path, monkeypatch, options):
    (own, mine), (before, other) = (
        rows_and_weights(warm_model, tmp_path / str(own), own, monkeypatch, **options) for own in (True, False)
    )
    for a, b in zip(own, before, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)  # float32 sums, by other parts
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_rewards_come_before_the_labels_though_no_group_has_a_pair(warm_model, tmp_path, monkeypatch):
    """DPO on groups that are all right learns nothing from them, but from those that are replayed."""
    options = {"process_reward": ProcessReward(replay=Replaying(iterations=1)), "prm_loss": alg.dpo, "until": 4}
    own, before = (
        rows_and_weights(warm_model, tmp_path / str(own), own, monkeypatch, **options)[0] for own in (True, False)
    )
    assert [row["process/scale"] for row in own] == [row["process/scale"] for row in before]
    assert own[1]["process/scale"] > 1e-3
    assert "prm/grad_norm" in own[1]


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
    prime = tiny.module(warm_model, policy_loss=PolicyLoss(proximal="engine"), probe=Probe(every=None))
    with pytest.raises(ValueError, match="Expected the engine's log-probs of the first batch to be the policy's"):
        tiny.fit(tmp_path, prime, data, 1)
