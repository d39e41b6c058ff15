"""What the PRM learns from, how often and since when, through the real pipeline, against plain forward passes."""

import math

import lightning.pytorch as pl
import pytest
import tiny
import torch
from test_resume import assert_equal, state
from transformers import AutoModelForCausalLM

from prime_lightning import algorithms as alg
from prime_lightning.models.batch import Batch
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.training.learning import PRMLearner
from prime_lightning.training.options import PolicyLoss, ProcessReward, Replaying, Update

STRICT = AccuracyFilter(low=0.3, high=0.8)


@torch.no_grad()
def slow(model, batch, temperature=1.0):
    """Log-probs of each response, token by token."""
    rows = []
    for tokens, head, n in zip(batch.tokens_BL, batch.prompt_length_B, batch.response_length_B, strict=True):
        ids = tokens[: head + n]
        logprobs = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
        rows.append([float(logprobs[t - 1, ids[t]]) for t in range(int(head), int(head + n))])
    return rows


def spied(prime):
    """What each PRM pass is given, with the policy's weights at that time, as a list that grows."""
    given, optimise = [], prime.prm_learner.optimise

    def spying(lessons):
        weights = {name: weight.clone() for name, weight in prime.policy.model.state_dict().items()}
        reference_BT = lessons.reference_logprobs_BT.clone()
        given.append((prime.trainer.global_step, lessons.batch, reference_BT, lessons.intercept_B, weights))
        return optimise(lessons)

    prime.prm_learner.optimise = spying
    return given


def run(folder, model, steps, reward, filtered=STRICT, **options):
    prime = tiny.module(model, process_reward=reward, **options)
    given = spied(prime)
    rollouts = tiny.data(model, accuracy_filter=filtered, patience=1000)
    rollouts.verifiers.submit = tiny.parity
    return tiny.fit(folder, prime, rollouts, steps), given, prime


def collected(model, most):
    """Two batches of a loader that hands rejected groups on, and what the filter saw, group by group."""
    data = tiny.data(model, accuracy_filter=STRICT, patience=1000)
    data.setup("fit")
    data.verifiers.submit = tiny.parity
    if most is not None:
        data.hand_on_rejected(most)
    loader, seen = data.training_loader(0, 1), []
    filtered = loader._filtered
    loader._filtered = lambda group, tally: seen.append(group) or filtered(group, tally)
    batches = []
    for _ in range(2):
        seen.clear()
        batches.append((loader.collect(), list(seen)))
    data.close()
    return batches


@pytest.mark.parametrize("most", [None, 0.0, 0.25, 10.0])
def test_rejected_groups_come_beside_the_batch_in_order_up_to_the_limit(warm_model, most):
    for batch, seen in collected(warm_model, most):
        rejected = [group for group in seen if not 0.3 <= sum(r.verdict.score for r in group) / 4 <= 0.8]
        assert rejected
        if most is None:
            assert batch.rejected is None
            continue
        expected = rejected[: math.ceil(most * 4)]
        assert batch.metrics.means().get("rollout/handed_on", 0) == len(expected) == batch.rejected.groups
        if expected:
            plain = Batch.of_groups(expected)
            for name in ("tokens_BL", "outcome_B", "mask_BT", "group_B", "behaviour_logprobs_BT"):
                assert torch.equal(getattr(batch.rejected, name), getattr(plain, name)), name
        else:
            assert not batch.rejected.valid_B.any()
        assert {r.prompt.draw for r in batch.rollouts} == {g[0].prompt.draw for g in seen if g not in rejected}


@pytest.mark.parametrize("reference", [False, True])
def test_the_prm_learns_from_all_and_the_policy_from_accepted_groups(warm_model, sharp_folder, tmp_path, reference):
    reward = ProcessReward(beta=0.5, learn_from="all")
    frozen = {"reference": str(sharp_folder)} if reference else {}
    history, given, _ = run(tmp_path, warm_model, 1, reward, **frozen)
    [(_, lessons, reference_BT, intercept_B, _)], batch = given, history.outputs[0].batch
    others = batch.rejected
    assert history.rows[0]["rollout/handed_on"] == others.groups > 0
    assert lessons.outcome_B.tolist() == batch.outcome_B.tolist() + others.outcome_B.tolist()
    rows = [(b, i) for b in (batch, others) for i in range(len(b))]
    for i, (b, j) in enumerate(rows):
        n = int(b.prompt_length_B[j] + b.response_length_B[j])
        assert lessons.tokens_BL[i, :n].tolist() == b.tokens_BL[j, :n].tolist()
    assert sorted(set(lessons.group_B.tolist())) == list(range(batch.groups + others.groups))
    assert not intercept_B.any()
    plain = slow(AutoModelForCausalLM.from_pretrained(sharp_folder if reference else warm_model), lessons)
    for row, expected in zip(reference_BT, plain, strict=True):
        torch.testing.assert_close(row[: len(expected)], torch.tensor(expected), rtol=0, atol=1e-4)
    assert history.outputs[0].advantage_BT.shape[0] == len(batch) == 16  # four groups of four, as without


def test_the_intercept_is_the_log_odds_of_right_answers_lately(warm_model, tmp_path):
    reward = ProcessReward(beta=0.5, learn_from="all", intercept="base_rate")
    history, given, prime = run(tmp_path, warm_model, 3, reward)
    rate, before = None, 0.0
    for row, out, (_, lessons, _, intercept_B, _) in zip(history.rows, history.outputs, given, strict=True):
        outcome, batch = lessons.outcome_B.tolist(), out.batch
        mean = (sum(outcome) + 0.5) / (len(outcome) + 1)
        rate = mean if rate is None else 0.7 * rate + 0.3 * mean
        expected = math.log(rate / (1 - rate))
        assert intercept_B.tolist() == pytest.approx([expected] * len(outcome), rel=1e-5)
        assert row["prm/intercept"] == pytest.approx(expected, rel=1e-5)
        # what is judged before the update has the intercept of before; the first PRM equals the policy, so r = 0
        if rate == mean:
            right = float(batch.outcome_B.mean())
            ce = -(right * math.log(0.5) + (1 - right) * math.log(0.5))
            assert (before, row["prm/ce"]) == (0.0, pytest.approx(ce, abs=1e-5))
        before = expected
    assert prime.prm_learner.present_intercept == pytest.approx(before)


def test_the_loss_has_the_intercept(warm_model, tmp_path):
    """With equal weights of PRM and reference the loss of a batch is CE of the intercept alone."""
    still = {"prm_optimizer": tiny.adam(0.0), "policy_optimizer": tiny.adam(0.0)}
    reward = ProcessReward(beta=0.5, learn_from="all", intercept="base_rate")
    history, given, _ = run(tmp_path, warm_model, 1, reward, **still)
    outcome, b = given[0][1].outcome_B.tolist(), history.rows[0]["prm/intercept"]
    chance = 1 / (1 + math.exp(-b))
    expected = -sum(math.log(chance if o else 1 - chance) for o in outcome) / len(outcome)
    assert history.rows[0]["prm/loss"] == pytest.approx(expected, abs=1e-4)


def test_the_prm_waits_for_right_answers_and_then_fits_what_it_kept(warm_model, tmp_path):
    replay = Replaying(iterations=9, passes=1, draw="groups", wait_right=20, first_passes=5)
    history, given, prime = run(tmp_path, warm_model, 5, ProcessReward(beta=0.5, replay=replay))
    right, expected = 0.0, []
    for step, out in enumerate(history.outputs):
        waited, right = right < 20, right + float(out.batch.outcome_B.sum())
        if right >= 20:  # the lessons of now, then replayed ones
            expected += [step] * (1 + (5 if waited else 1))
    assert [step for step, *_ in given] == expected
    assert 1 <= expected[0] < 4
    assert prime.prm_learner.seen_right == right
    assert "prm/loss" not in history.rows[0]


@pytest.mark.parametrize("kind", ["present", "stored"])
def test_replayed_responses_are_scored_against_the_present_or_the_past_policy(warm_model, tmp_path, kind):
    replay = Replaying(iterations=3, passes=2, draw="groups", reference=kind)
    fast = {"policy_optimizer": tiny.adam(1e-2)}
    _, given, _ = run(tmp_path, warm_model, 3, ProcessReward(beta=0.5, replay=replay), **fast)
    own = {step: weights for step, batch, _, _, weights in given}
    plain = AutoModelForCausalLM.from_pretrained(warm_model)
    assert [step for step, *_ in given] == [0, 1, 1, 1, 2, 2, 2]
    checked = 0
    for step, batch, reference_BT, _, _ in given:
        for i, (row, born) in enumerate(zip(reference_BT, batch.version_BT[:, 0].tolist(), strict=True)):
            plain.load_state_dict(own[step if kind == "present" else born])
            [expected] = slow(plain, batch.select(torch.tensor([i])))
            torch.testing.assert_close(row[: len(expected)], torch.tensor(expected), rtol=0, atol=2e-4)
            checked += born < step
    assert checked > 0


def test_the_reward_is_paid_against_the_policy_and_the_loss_keeps_its_reference(warm_model, sharp_folder, tmp_path):
    reward = ProcessReward(beta=0.5, normalise="none", against="policy")
    history, given, _ = run(tmp_path, warm_model, 2, reward, reference=str(sharp_folder), prm=str(sharp_folder))
    plain = AutoModelForCausalLM.from_pretrained(sharp_folder)
    out, (_, batch, reference_BT, _, weights) = history.outputs[0], given[0]
    frozen = slow(plain, batch)
    plain = AutoModelForCausalLM.from_pretrained(warm_model)
    plain.load_state_dict(weights)
    for i, (prm, policy) in enumerate(zip(frozen, slow(plain, batch), strict=True)):  # the PRM starts as the reference
        n = len(prm)
        torch.testing.assert_close(reference_BT[i, :n], torch.tensor(prm), rtol=0, atol=1e-4)
        expected = 0.5 * (torch.tensor(prm) - torch.tensor(policy))
        torch.testing.assert_close(out.process_BT[i, :n], expected, rtol=0, atol=1e-4)
    assert history.rows[0]["process/accuracy"] == pytest.approx(pairs_ranked(out))
    assert history.rows[0]["prm/accuracy"] == 0.5
    assert history.rows[0]["prm/ce"] == pytest.approx(math.log(2), abs=1e-5)  # judged by what the loss is about


def pairs_ranked(iteration):
    """Of the pairs of a group, one right and one wrong, those of which the right one is paid more."""
    rows = list(zip(iteration.batch.group_B, iteration.batch.outcome_B, iteration.process_BT.sum(1), strict=True))
    ranked = [
        float(paid > less) + 0.5 * float(paid == less)
        for group, right, paid in rows
        for other, wrong, less in rows
        if group == other and right > wrong
    ]
    return sum(ranked) / len(ranked)


def everything(model):
    replay = Replaying(iterations=3, passes=2, draw="groups", reference="present", wait_right=15, first_passes=3)
    reward = ProcessReward(
        beta=0.5, learn_from="all", most_rejected=2.0, intercept="base_rate", against="policy", replay=replay
    )
    gate = alg.ProcessGate(max_ce=None, min_accuracy=0.0)
    rollouts = tiny.data(model, accuracy_filter=STRICT, oversample=2.0, surplus="keep", patience=1000)
    return tiny.module(model, process_reward=reward, gate=gate), rollouts


def test_a_resumed_run_has_learned_the_same(warm_model, tmp_path):
    save = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, again = tiny.History(), tiny.History()
    undisturbed = tiny.trainer(tmp_path, 5, save, history=whole)
    undisturbed.fit(*everything(warm_model))
    resumed = tiny.trainer(tmp_path, 5, history=again)
    resumed.fit(*everything(warm_model), ckpt_path=tmp_path / "step=2.ckpt")
    assert sum(row.get("rollout/handed_on", 0) for row in again.rows) > 0
    assert_equal(again.rows, whole.rows[2:])
    assert_equal(state(resumed), state(undisturbed))
    facts = [
        (t.lightning_module.prm_learner.base_rate.rate, t.lightning_module.prm_learner.seen_right)
        for t in (resumed, undisturbed)
    ]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replay": Replaying(iterations=2, reference="present")}, "Expected `reference: null` with"),
        ({"learn_from": "all"}, None),
    ],
)
def test_options_that_contradict_each_other_are_refused(warm_model, tmp_path, options, words):
    settings = {"process_reward": ProcessReward(**options), "reference": str(warm_model)}
    if words:
        with pytest.raises(ValueError, match=words):
            tiny.module(warm_model, **settings)
    else:  # without a PRM nobody learns from rejected groups, and nobody asks for them
        history = tiny.fit(tmp_path, tiny.module(warm_model, **settings | {"prm": None}), tiny.data(warm_model), 1)
        assert history.outputs[0].batch.rejected is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Replaying(passes=-1), r"`process_reward\.replay\.passes` of at least 0, got -1"),
        (lambda: Replaying(wait_right=3), r"`process_reward\.replay\.iterations` above 0 with `wait_right`, got 0"),
        (lambda: ProcessReward(most_rejected=-1.0), r"`process_reward\.most_rejected` of 0 or more, got -1"),
        (lambda: alg.BaseRate(momentum=1.0), r"`momentum` in \[0, 1\), got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_rejected_groups_are_learned_from_with_the_engines_logprobs(warm_model, tmp_path):
    """`proximal: engine` takes no pass of the policy for them either."""
    reward = ProcessReward(beta=0.5, learn_from="all")
    loss = PolicyLoss(proximal="engine")
    history, given, _ = run(tmp_path, warm_model, 2, reward, policy_loss=loss)
    batch, lessons, reference_BT = history.outputs[1].batch, given[1][1], given[1][2]
    others = reference_BT[len(batch) :, : batch.rejected.mask_BT.shape[1]]
    assert torch.equal(others, batch.rejected.behaviour_logprobs_BT)
    assert len(lessons) == len(batch) + len(batch.rejected)


@pytest.mark.parametrize("against", ["reference", "policy"])
def test_one_step_over_all_lessons_gives_rewards_of_before(warm_model, sharp_folder, tmp_path, monkeypatch, against):
    """The update's own forward pass and a pass before it say the same of accepted rollouts."""
    reward = ProcessReward(beta=0.5, learn_from="all", intercept="base_rate", against=against)
    rows = []
    for own in (True, False):
        with monkeypatch.context() as patched:
            if not own:
                patched.setattr(PRMLearner, "goes_first", False)
            one = Update(minibatches=1, micro_tokens=128)
            options = {"reference": str(sharp_folder), "prm_update": one, "policy_update": one}
            rows.append(run(tmp_path / str(own), warm_model, 3, reward, **options)[0].rows)
    same = [row["process/accuracy"] == row["prm/accuracy"] for row in rows[0]]
    assert all(same) if against == "reference" else not all(same)
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
