"""Groups without outcome signal that train the policy by the process reward alone, and steps as actions."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prm_learning import run

from prime_lightning import algorithms as alg
from prime_lightning.training.options import Credit, ProcessReward, Update

OPEN = {"max_ce": None, "min_accuracy": 0.0}
members = st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())


@given(st.lists(members, min_size=1, max_size=12), st.sampled_from(["none", "all_wrong", "all"]))
def test_groups_without_signal_are_those_whose_known_outcomes_are_equal(rows, which):
    group_B, outcome_B, valid_B = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = []
    for group, _, _ in rows:
        known = [outcome for other, outcome, valid in rows if other == group and valid]
        silent = len(known) >= 2 and len(set(known)) == 1
        expected.append(silent and (which == "all" or (which == "all_wrong" and known[0] == 0)))
    outcome_B[~valid_B] = torch.nan
    assert alg.without_signal(outcome_B, group_B, valid_B, which).tolist() == expected


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(-5, 5), st.booleans(), st.booleans()), max_size=6), min_size=1, max_size=4)
)
def test_a_step_is_one_action(rows):
    """Each token: credit, whether it is under the mask, whether it ends a step."""
    T = max(1, max(map(len, rows)))
    padded = [row + [(9, False, False)] * (T - len(row)) for row in rows]
    credit_BT = torch.tensor([[float(c) for c, _, _ in row] for row in padded])
    mask_BT = torch.tensor([[m for _, m, _ in row] for row in padded])
    ends_BT = torch.tensor([[e for _, _, e in row] for row in padded])
    steps_BT = ends_BT.long().cumsum(1) - ends_BT.long()
    got = alg.per_step(credit_BT, mask_BT, steps_BT)
    for i, row in enumerate(padded):
        step, steps = 0, []
        for _, _, ends in row:
            steps.append(step)
            step += ends
        for t, (_, counts, _) in enumerate(row):
            same = [c for s, (c, m, _) in zip(steps, row, strict=True) if m and s == steps[t]]
            assert got[i, t] == (sum(same) if counts else 0)


def leave_one_out(process_BT, batch, rows):
    """Eq. 5 of some rows without its outcome part, written out."""
    length = batch.response_length_B.tolist()
    mean = [float(process_BT[i, : length[i]].mean()) for i in range(len(batch))]
    for i in rows:
        others = [j for j in range(len(batch)) if j != i and batch.group_B[j] == batch.group_B[i]]
        baseline = sum(mean[j] for j in others) / len(others)
        yield i, [sum(float(process_BT[i, s]) - baseline for s in range(t, length[i])) for t in range(length[i])]


@pytest.mark.parametrize("which", ["all_wrong", "all"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_silent_groups_join_once_the_gate_is_open(warm_model, sharp_folder, tmp_path, which, minibatches):
    reward = ProcessReward(beta=0.5, normalise="none", learn_from="all", process_only=which)
    update = Update(minibatches=minibatches, micro_tokens=128)
    history, given_, _ = run(
        tmp_path, warm_model, 4, reward, gate=alg.ProcessGate(**OPEN), prm=str(sharp_folder),
        reference=str(warm_model), prm_update=update, policy_update=update,
    )  # fmt: skip
    assert "train/process_only" not in history.rows[0]  # the gate opens with the first look at the PRM
    assert len(history.outputs[0].batch) == 16
    joined = 0
    for row, out, (_, lessons, *_) in list(zip(history.rows, history.outputs, given_, strict=True))[1:]:
        batch = out.batch
        extra = [i for i in range(len(batch)) if batch.group_B[i] >= 4]
        joined += len(extra)
        assert row["train/process_only"] == len(extra) / 4
        assert row["train/outcome"] == pytest.approx(float(batch.outcome_B[:16].mean()))
        assert sorted(batch.group_B.tolist()) == sorted(4 * list(range(len(batch) // 4)))
        for i in extra:
            outcomes = batch.outcome_B[batch.group_B == batch.group_B[i]].tolist()
            assert set(outcomes) in ([{0.0}] if which == "all_wrong" else [{0.0}, {1.0}])
        for i, expected in leave_one_out(out.process_BT, batch, extra):
            got = out.advantage_BT[i, : len(expected)]
            torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-4)
        texts = [str(tokens.tolist()) for tokens in lessons.tokens_BL]
        others = int(batch.rejected.valid_B.sum())
        assert len(texts) == len(batch) + others == 4 * (4 + row["rollout/handed_on"])  # each response once
    assert joined > 0


def test_a_gate_that_closes_meanwhile_leaves_them_out(warm_model, tmp_path):
    """Their rows count for nothing then: neither in losses nor in denominators."""
    reward = ProcessReward(beta=0.5, learn_from="all", process_only="all")
    weights = iter([True, False, False])

    class Gate(alg.ProcessGate):
        def update(self, ce, accuracy):
            super().update(ce, accuracy)
            self._level = int(next(weights))
            return self.weight

    history, _, _ = run(tmp_path, warm_model, 3, reward, gate=Gate(**OPEN))
    batch, advantage_BT = history.outputs[1].batch, history.outputs[1].advantage_BT
    assert len(batch) > 16
    assert not batch.mask_BT[16:].any()
    assert not advantage_BT[16:].any()
    assert len(history.outputs[2].batch) == 16


def test_a_prm_that_is_not_trained_can_rank_them_too(warm_model, sharp_folder, tmp_path):
    reward = ProcessReward(beta=0.5, update="none", learn_from="all", process_only="all")
    options = {"gate": alg.ProcessGate(**OPEN), "prm": str(sharp_folder)}
    history, given_, _ = run(tmp_path, warm_model, 3, reward, **options)
    assert not given_  # no update of the PRM
    assert sum(row.get("train/process_only", 0) for row in history.rows) > 0


def test_without_the_option_or_the_lessons_nothing_joins(warm_model, tmp_path):
    with pytest.raises(ValueError, match=r"`process_reward\.learn_from: all` with `process_only: all`, got accepted"):
        ProcessReward(process_only="all")
    reward = ProcessReward(learn_from="all", process_only="all")
    with pytest.raises(ValueError, match="Expected no critic with"):
        tiny.module(warm_model, process_reward=reward, critic=str(warm_model), advantage=alg.gae)


def test_every_token_of_a_step_gets_its_credit(warm_model, sharp_folder, tmp_path):
    """`gamma_process: 0`: the centred reward of each token, summed over its step."""
    reward = ProcessReward(beta=0.5, normalise="none", step_separator=";")
    credit = Credit(gamma_process=0.0, process_per="step", process_weight=2.0)
    options = {"reference": str(warm_model), "prm": str(sharp_folder), "gate": alg.ProcessGate(**OPEN)}
    history, _, prime = run(tmp_path, warm_model, 1, reward, credit=credit, **options)
    out = history.outputs[0]
    batch, process_BT = out.batch, out.process_BT
    length = batch.response_length_B.tolist()
    mean = [float(process_BT[i, : length[i]].mean()) for i in range(len(batch))]
    separator = prime.tokenizer.convert_tokens_to_ids(";")
    for i, rollout in enumerate(batch.rollouts):
        others = [j for j in range(len(batch)) if j != i and batch.group_B[j] == batch.group_B[i]]
        baseline = sum(mean[j] for j in others) / 3
        outcome = float(batch.outcome_B[i]) - sum(float(batch.outcome_B[j]) for j in others) / 3
        steps, step = [[]], 0
        for t, token in enumerate(rollout.completion.token_ids):
            steps[step].append(t)
            if token == separator:
                steps.append([])
                step += 1
        for inside in steps:
            total = sum(float(process_BT[i, t]) - baseline for t in inside)
            for t in inside:
                assert float(out.advantage_BT[i, t]) == pytest.approx(outcome + 2 * total, abs=1e-4)
    with pytest.raises(ValueError, match=r"`credit\.gamma_process: 0` with `process_per: step`, got 1\.0"):
        Credit(process_per="step")
