"""What real iterations log of PRM and policy, against plain loops over plain forward passes of the same weights."""

import math
from itertools import product
from statistics import correlation, fmean

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from prime_lightning import algorithms as alg
from prime_lightning.training.options import ProcessReward, Replaying


@torch.no_grad()
def slow(model, batch):
    """Log-probs of each response, token by token."""
    rows = []
    for tokens, head, n in zip(batch.tokens_BL, batch.prompt_length_B, batch.response_length_B, strict=True):
        ids = tokens[: head + n]
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
        rows.append([float(logprobs[t - 1, ids[t]]) for t in range(int(head), int(head + n))])
    return rows


def judged(rewards, batch):
    """Cross entropy, share of pairs, AUC and calibration error of summed rewards, one after the other."""
    outcome, group = batch.outcome_B.tolist(), batch.group_B.tolist()
    chance = [1 / (1 + math.exp(-r)) for r in rewards]
    pairs = [(i, j) for i, j in product(range(len(rewards)), repeat=2) if outcome[i] > outcome[j]]
    inside = [(i, j) for i, j in pairs if group[i] == group[j]]
    above = {(i, j): (rewards[i] > rewards[j]) + (rewards[i] == rewards[j]) / 2 for i, j in pairs}
    bins = [[(p - o) for p, o in zip(chance, outcome, strict=True) if b <= 10 * p < b + 1] for b in range(10)]
    return {
        "ce": -fmean(math.log(p if o else 1 - p) for p, o in zip(chance, outcome, strict=True)),
        "accuracy": fmean(above[pair] for pair in inside),
        "auc": fmean(above.values()),
        "calibration_error": sum(abs(sum(gaps)) for gaps in bins) / len(rewards),
    }


@pytest.fixture(scope="module")
def run(warm_model, sharp_folder, tmp_path_factory):
    """Two iterations with a reference, replay, and a second look at the PRM; and log-probs of the first one by hand."""
    folder = tmp_path_factory.mktemp("panel")
    prime = tiny.module(
        warm_model,
        reference=str(sharp_folder),
        gate=alg.ProcessGate(max_ce=None, min_accuracy=0.0),
        process_reward=ProcessReward(beta=0.5, replay=Replaying(iterations=1), second_look=1),
    )
    snapshots = []

    class Snapshot(tiny.pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            snapshots.append({name: weight.clone() for name, weight in module.prm.model.state_dict().items()})

    history = tiny.History()
    tiny.trainer(folder, 2, Snapshot(), history=history).fit(prime, tiny.data(warm_model, prompts_per_batch=8))
    plain = {
        name: AutoModelForCausalLM.from_pretrained(path)
        for name, path in (("start", warm_model), ("ref", sharp_folder))
    }
    after = AutoModelForCausalLM.from_pretrained(warm_model)
    after.load_state_dict(snapshots[0])
    batch = history.outputs[0].batch
    assert batch.valid_B.all()
    assert 0 < batch.outcome_B.mean() < 1
    return history.rows, batch, {name: slow(model, batch) for name, model in (plain | {"after": after}).items()}


def rewards(logprobs, role):
    return [
        [0.5 * (a - b) for a, b in zip(x, y, strict=True)] for x, y in zip(logprobs[role], logprobs["ref"], strict=True)
    ]


def test_the_prm_before_its_update(run):
    [row, _], batch, logprobs = run
    tokens = rewards(logprobs, "start")
    sums = [sum(r) for r in tokens]
    expected = judged(sums, batch) | {
        "reward": fmean(sums),
        "outcome_correlation": correlation(sums, batch.outcome_B.tolist()),
        "last_token_share": sum(abs(r[-1]) for r in tokens) / sum(abs(x) for r in tokens for x in r),
    }
    for name, value in expected.items():
        assert row[f"prm/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    lengths = [len(r) for r in tokens]
    if len(set(lengths)) > 1:
        assert row["prm/length_correlation"] == pytest.approx(correlation(sums, lengths), rel=1e-3, abs=1e-4)
    assert (row["gate/weight"], row["gate/ce"]) == (1.0, pytest.approx(expected["ce"], rel=1e-3))


def test_the_prm_after_its_update(run):
    [row, _], batch, logprobs = run
    expected = judged([sum(r) for r in rewards(logprobs, "after")], batch)
    for name in ("ce", "accuracy"):
        assert row[f"prm/{name}_after"] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    assert row["prm/ce_after"] < row["prm/ce"]


def test_the_policy_and_the_ages(run):
    [row, second], batch, logprobs = run
    gaps = [b - a for x, y in zip(logprobs["start"], logprobs["ref"], strict=True) for a, b in zip(x, y, strict=True)]
    assert row["policy/reference_kl"] == pytest.approx(fmean(math.exp(g) - 1 - g for g in gaps), rel=1e-3)
    assert row["train/outcome"] == pytest.approx(fmean(batch.outcome_B.tolist()))
    assert "prm/replay_age" not in row
    assert second["prm/replay_age"] == 1.0
    assert (row["rollout/policy_lag"], second["rollout/policy_lag"]) == (0, 0)
