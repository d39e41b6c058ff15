"""One PRIME iteration, on a tiny model, through the real data module, engine and trainer."""

import math
from collections import Counter
from concurrent.futures import Future

import pytest
import tiny
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from transformers import GPT2Config, GPT2LMHeadModel

from prime_lightning import algorithms as alg
from prime_lightning.models.options import Loading
from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.rollout import Sampling, Verdict
from prime_lightning.training.options import Credit, PolicyLoss, Probe, ProcessReward, Replaying, Update
from prime_lightning.verifiers import Verifiers


def weights(module, role):
    return {name: p.detach().clone() for name, p in getattr(module, role).named_parameters()}


def moved(module, role, before):
    return max(float((p.detach() - before[name]).abs().max()) for name, p in getattr(module, role).named_parameters())


def test_iterations_are_counted_once_and_are_on_policy(warm_model, tmp_path):
    prime = tiny.module(warm_model)  # two minibatches of two models: four optimizer steps an iteration
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 3)
    assert prime.trainer.global_step == 3
    assert [row["rollout/policy_lag"] for row in history.rows] == [0, 0, 0]
    assert prime.trainer.datamodule.engine.version == 3
    for row in history.rows:  # engine and trainer are the same model in the same precision
        assert row["importance/abs_diff_max"] < 1e-4
        assert row["rollout/unknown"] == 0


def test_without_prm_the_advantage_is_plain_rloo(warm_model, tmp_path):
    prime = tiny.module(warm_model, prm=None)
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 1)
    out = history.outputs[0]
    batch = out.batch
    for i in range(len(batch)):  # Eq. 4, written out
        others = [j for j in range(len(batch)) if j != i and batch.group_B[j] == batch.group_B[i]]
        expected = batch.outcome_B[i] - sum(batch.outcome_B[j] for j in others) / len(others)
        n = int(batch.response_length_B[i])
        torch.testing.assert_close(out.advantage_BT[i, :n], expected.expand(n))
    assert out.process_BT is None


def test_single_forward_rewards_come_from_one_prm_version(warm_model, tmp_path):
    """All process rewards of an iteration are those of the PRM before its update; of the double forward, after it."""
    raw = ProcessReward(beta=0.5, normalise="none")
    for update, same_as_start in (("after", True), ("before", False), ("none", True)):
        prime = tiny.module(
            warm_model,
            reference=str(warm_model),
            process_reward=ProcessReward(beta=0.5, normalise="none", update=update),
        )
        out = tiny.fit(tmp_path, prime, tiny.data(warm_model), 1).outputs[0]
        # the PRM starts as the reference, so before any update every reward is zero
        assert (float(out.process_BT.abs().max()) < 1e-6) is same_as_start
    assert raw.update == "after"


def test_a_frozen_prm_and_the_reference_stay_as_they_are(warm_model, tmp_path):
    prime = tiny.module(warm_model, reference=str(warm_model), process_reward=ProcessReward(update="none"))
    prime.configure_model()
    before = {role: weights(prime, role) for role in ("prm", "reference", "policy")}
    tiny.fit(tmp_path, prime, tiny.data(warm_model), 2)
    assert moved(prime, "prm", before["prm"]) == 0
    assert moved(prime, "reference", before["reference"]) == 0
    assert moved(prime, "policy", before["policy"]) > 0


def test_prm_update_lowers_its_cross_entropy(warm_model, tmp_path):
    """Many passes over one batch must fit its labels, whichever loss trains the PRM."""
    for loss in (alg.ce, alg.dpo, alg.dpo_detached):
        update = Update(minibatches=1, epochs=15, grad_clip=10.0)
        reward = ProcessReward(beta=1.0, update="before")
        prime = tiny.module(warm_model, prm_loss=loss, prm_update=update, process_reward=reward)
        history = tiny.fit(tmp_path, prime, tiny.data(warm_model, prompts_per_batch=8), 1)
        assert history.rows[0]["prm/accuracy"] > 0.8, loss.__name__
        if loss is alg.ce:
            assert history.rows[0]["prm/ce"] < math.log(2)


def test_micro_batches_do_not_change_the_gradient(warm_model, tmp_path):
    """Splitting a step into micro-batches, even of one response, gives the weights of one large batch."""
    ended = []
    for micro_tokens in (1, 100_000):
        update = Update(minibatches=1, micro_tokens=micro_tokens)
        prime = tiny.module(warm_model, policy_update=update, prm_update=update)
        tiny.fit(tmp_path, prime, tiny.data(warm_model), 2)
        ended.append({role: weights(prime, role) for role in ("policy", "prm")})
    for role in ("policy", "prm"):
        for name, tensor in ended[0][role].items():
            torch.testing.assert_close(tensor, ended[1][role][name], atol=2e-5, rtol=0)


def test_the_gate_keeps_an_ignorant_prm_out(warm_model, tmp_path):
    gate = alg.ProcessGate(after=2, max_ce=None, min_accuracy=0.0, ramp=2)
    prime = tiny.module(warm_model, gate=gate)
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 4)
    assert [row["process/weight"] for row in history.rows] == [0.0, 0.0, 0.5, 1.0]


def test_unknown_verdicts_teach_nothing(warm_model, tmp_path):
    """Responses whose verifier failed get no reward, no advantage and no place in a baseline."""

    class Failing(Verifiers):
        def submit(self, prompt, text):
            graded = super().submit(prompt, text)
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls % 2 == 0:
                graded = type(graded)()
                graded.set_result(Verdict.unknown("the worker died"))
            return graded

    reward = ProcessReward(beta=1.0, update="before", normalise="none")
    gate = alg.ProcessGate(max_ce=None, min_accuracy=0.0)
    prime = tiny.module(warm_model, process_reward=reward, gate=gate)
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model, verifiers=Failing()), 1)
    out = history.outputs[0]
    unknown_B = ~out.batch.valid_B
    assert unknown_B.tolist() == [False, True] * 8
    for earned_BT in (out.process_BT, out.advantage_BT):
        assert float(earned_BT[unknown_B].abs().max()) == 0
        assert float(earned_BT[~unknown_B].abs().max()) > 0
    assert history.rows[0]["rollout/unknown"] == 0.5
    outcome_B = out.batch.outcome_B
    for i in range(0, 16, 4):  # two known members a group: each is the other's baseline
        mine, other = out.process_BT[i].sum(), out.process_BT[i + 2].sum()
        length_B = out.batch.response_length_B
        expected = outcome_B[i] - outcome_B[i + 2] + mine - other / length_B[i + 2] * length_B[i]
        torch.testing.assert_close(out.advantage_BT[i, 0], expected, atol=1e-5, rtol=1e-4)


def test_a_users_verifier_that_fails_is_unknown(warm_model, tmp_path):
    """`math.sqrt(prompt, completion)` is a TypeError each time; all groups are then rejected, and it is said why."""
    rollouts = tiny.data(warm_model, patience=2)
    rollouts.train.kind = "math.sqrt"
    with pytest.raises(ValueError, match=r"accepted 0 of 9 groups.*few_valid 9.*TypeError"):
        tiny.fit(tmp_path, tiny.module(warm_model), rollouts, 1)
    rollouts = tiny.data(warm_model, patience=2)
    rollouts.train.kind = "no_such_package.verifier"
    with pytest.raises(ValueError, match=r"no_such_package"):
        tiny.fit(tmp_path, tiny.module(warm_model), rollouts, 1)


def test_non_finite_weights_skip_steps_and_then_stop(warm_model, tmp_path):
    prime = tiny.module(warm_model)  # two minibatches; the PRM stays finite all the while
    prime.configure_model()
    history = tiny.History()
    rollouts = tiny.data(warm_model)

    class Poison(tiny.pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            handle = module.policy.model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
            module.handles = [*getattr(module, "handles", []), handle]

    trainer = tiny.trainer(tmp_path, 10, Poison(), history=history)
    before = weights(prime, "policy")
    with pytest.raises(FloatingPointError, match="of the policy was not finite 5 times in a row, at iteration 2"):
        trainer.fit(prime, rollouts)
    assert [row["policy/skipped_steps"] for row in history.rows] == [2, 2]
    assert [row["prm/skipped_steps"] for row in history.rows] == [0, 0]
    assert moved(prime, "policy", before) == 0


def test_tokens_with_non_finite_logprobs_are_dropped_and_counted(warm_model, tmp_path):
    class Broken(tiny.HFEngine):
        def stream(self, prompts, sampling, finished=None):
            for prompt, completions in super().stream(prompts, sampling, finished):
                completions[0].logprobs[0] = float("-inf")
                yield prompt, completions

    history = tiny.fit(tmp_path, tiny.module(warm_model), tiny.data(warm_model, engine=Broken()), 1)
    assert history.rows[0]["policy/nonfinite_tokens"] == 4  # one of each group
    assert not history.outputs[0].batch.mask_BT[0, 0]
    assert all(math.isfinite(v) for v in history.rows[0].values())


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": alg.grpo},
        {"advantage": alg.reinforce},
        {"advantage": alg.rloo_official, "credit": Credit(whiten=True)},
        {"process_reward": ProcessReward(granularity="step", step_separator=";")},
        {"process_reward": ProcessReward(granularity="response", normalise="batch_std")},
        {"policy_loss": PolicyLoss(kl="reward", kl_weight=0.1, kl_estimator="k1"), "reference": True},
        {"policy_loss": PolicyLoss(kl="loss", kl_weight=0.1), "reference": True},
        {"policy_loss": PolicyLoss(aggregate="sequence", entropy_weight=0.01, importance_cap=None)},
        {"policy_loss": PolicyLoss(aggregate="constant", constant_length=8, clip_high=0.28)},
        {"process_reward": ProcessReward(replay=Replaying(iterations=2))},
        {"prm_loss": alg.dpo_detached},
        {"loading": Loading(gradient_checkpointing=True, packed=True, chunk_tokens=16)},
        {"loading": Loading(dtype="bfloat16", attention="eager")},
        {"schedule": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.5, total_iters=2)},
    ],
    ids=lambda options: ",".join(options),
)
def test_every_option_trains(warm_model, tmp_path, options):
    options = dict(options)
    if options.get("reference"):
        options["reference"] = str(warm_model)
    prime = tiny.module(warm_model, gate=alg.ProcessGate(max_ce=None, min_accuracy=0.0), **options)
    prime.configure_model()
    before = weights(prime, "policy")
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 3)
    assert 1e-5 < moved(prime, "policy", before) < 0.1
    assert all(math.isfinite(v) for row in history.rows for k, v in row.items() if k != "prm/auc")


def watched_entropy(prime, value):
    """Which entropy each pass asks for, by its phase; the policy's is multiplied by this value."""
    asked, logprobs = Counter(), prime.stepper.logprobs

    def asking(role, batch, entropy="none", *, as_sampled=False):
        asked[prime.stepper.doing, entropy] += 1
        scores, entropy_bt = logprobs(role, batch, entropy, as_sampled=as_sampled)
        return scores, None if entropy_bt is None else value * entropy_bt

    prime.stepper.logprobs = asking
    return asked


@pytest.mark.parametrize(("weight", "kind", "skipped"), [(0.0, "measured", 0), (0.01, "trained", 2)])
def test_entropy_is_computed_where_it_is_used(warm_model, tmp_path, weight, kind, skipped):
    """Only in the policy's update; and one that is not finite reaches the loss only where the loss has it."""
    replayed = ProcessReward(replay=Replaying(iterations=2))
    options = {"reference": str(warm_model), "process_reward": replayed, "probe": Probe(every=None)}
    prime = tiny.module(warm_model, policy_loss=PolicyLoss(entropy_weight=weight), **options)
    asked = watched_entropy(prime, math.nan)
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 1)
    assert set(asked) == {("score", "none"), ("prm", "none"), ("policy", kind)}
    assert history.rows[0]["policy/skipped_steps"] == skipped
    assert math.isnan(history.rows[0]["policy/entropy"])


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_the_logged_entropy_is_the_policys(warm_model, tmp_path, weight):
    """That of its distributions on the sampled tokens; an update this small does not move it."""
    still = {"policy_optimizer": tiny.adam(0.0), "policy_loss": PolicyLoss(entropy_weight=weight)}
    prime = tiny.module(warm_model, **still)
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 1)
    batch = history.outputs[0].batch
    total = 0.0
    for i in range(len(batch)):
        p, r = int(batch.prompt_length_B[i]), int(batch.response_length_B[i])
        logits_LV = prime.policy.model(batch.tokens_BL[i : i + 1, : p + r]).logits[0, p - 1 : -1]
        total += float(torch.distributions.Categorical(logits=logits_LV.detach()).entropy().sum())
    assert history.rows[0]["policy/entropy"] == pytest.approx(total / int(batch.mask_BT.sum()), rel=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_scores_after_an_optimizer_step_are_the_new_weights(warm_model, tmp_path, monkeypatch, cached):
    """Autocast may keep bfloat16 copies of weights for as long as one training step lasts; here it must not."""
    if cached:  # or this test would show nothing
        keeping = lambda self: torch.autocast("cpu", torch.bfloat16, cache_enabled=True)  # noqa: E731
        monkeypatch.setattr(MixedPrecision, "autocast_context_manager", keeping)
    prime = tiny.module(warm_model, policy_optimizer=tiny.adam(1e-2))
    scores, update_policy = [], prime.policy_learner.update

    def watched(batch, *rest):
        scores.append(prime.stepper.score("policy", batch))
        update_policy(batch, *rest)
        scores.append(prime.stepper.score("policy", batch))
        torch.clear_autocast_cache()
        scores.append(prime.stepper.score("policy", batch))

    prime.policy_learner.update = watched
    tiny.fit(tmp_path, prime, tiny.data(warm_model), 1, precision="bf16-mixed")
    before_BT, after_BT, fresh_BT = scores
    assert (fresh_BT - before_BT).abs().max() > 0.01
    assert torch.equal(after_BT, fresh_BT) is not cached


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"shared_prompts": "off"}])
def test_packed_rows_and_shared_prompts_train_as_padded_rows(warm_model, tmp_path, more):
    """Policy, PRM, reference and critic; micro-batches of a few groups, which are not those of padded rows."""
    rows = []
    for loading in (Loading(), Loading(attention="varlen", packed=True, **more)):
        prime = tiny.module(
            warm_model,
            reference=str(warm_model),
            critic=str(warm_model),
            advantage=alg.gae,
            loading=loading,
            process_reward=ProcessReward(replay=Replaying(iterations=1)),
            policy_update=Update(minibatches=2, micro_tokens=90),
        )
        computed = tokens_of(prime)
        rows.append((tiny.fit(tmp_path, prime, tiny.data(warm_model), 3).rows, sum(computed)))
    (padded, before), (packed, after) = rows
    for row, other in zip(padded, packed, strict=True):
        assert row.keys() == other.keys()
        assert all(other[k] == pytest.approx(row[k], rel=2e-3, abs=2e-4, nan_ok=True) for k in row)
    assert after < (before if more.get("shared_prompts") == "off" else 0.85 * before)  # 6 + 4 x 8 tokens, not 4 x 14


def tokens_of(prime):
    """Tokens of each call of the policy, as a list that grows."""
    prime.configure_model()
    seen = []
    layer = prime.policy.model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0][..., 0].numel()))
    return seen


def test_mixed_precision_keeps_float32_weights(warm_model, tmp_path):
    prime = tiny.module(warm_model)
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 2, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 for p in prime.parameters())
    # the trainer's log-probs are now bfloat16's, and the importance correction sees the difference
    assert 1e-4 < history.rows[0]["importance/abs_diff_max"] < 0.5


def test_ppo_trains_a_critic(warm_model, tmp_path):
    prime = tiny.module(warm_model, critic=str(warm_model), advantage=alg.gae, critic_optimizer=tiny.adam(1e-2))
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model, prompts_per_batch=16), 8)
    errors = [row["value/squared_error"] for row in history.rows]
    assert errors[-1] < errors[0]  # the critic starts at zero and moves towards the mean return


def test_step_rewards_stand_on_the_separator(warm_model, tmp_path):
    reward = ProcessReward(granularity="step", step_separator=";", normalise="none", update="before", beta=1.0)
    prime = tiny.module(warm_model, process_reward=reward)
    out = tiny.fit(tmp_path, prime, tiny.data(warm_model), 1).outputs[0]
    batch, process_BT = out.batch, out.process_BT
    separator = prime.tokenizer.convert_tokens_to_ids(";")
    for i, rollout in enumerate(batch.rollouts):
        tokens = rollout.completion.token_ids
        for t in range(len(tokens) - 1):  # the last token ends the last step
            assert tokens[t] == separator or float(process_BT[i, t]) == 0


def test_temperature_of_the_sampling_is_the_policys(warm_model, tmp_path):
    """At temperature 0.7 the trainer's log-probs equal the engine's, which sampled at 0.7."""
    rollouts = tiny.data(warm_model, sampling=Sampling(samples=4, max_tokens=8, temperature=0.7))
    history = tiny.fit(tmp_path, tiny.module(warm_model), rollouts, 2)
    assert max(row["importance/abs_diff_max"] for row in history.rows) < 1e-4


def test_dropout_is_off(tmp_path, warm_model):
    """GPT-2 has dropout of 0.1 everywhere; engine and trainer must still agree on each log-prob."""
    tokenizer = load_tokenizer(str(warm_model))
    shape = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=None
    )
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    prime = tiny.module(tmp_path / "gpt2")
    history = tiny.fit(tmp_path, prime, tiny.data(tmp_path / "gpt2"), 1)
    assert prime.policy.training
    assert history.rows[0]["importance/abs_diff_max"] < 1e-4


def test_an_engine_with_other_weights_stops_the_run(sharp_folder, warm_model, tmp_path):
    """Stale, partial or wrongly named weights are found in the first batch, and not trained on."""

    class Stale(tiny.HFEngine):
        def load_weights(self, weights, version):
            self.version = version

        def start(self, model):
            super().start(sharp_folder)

    prime = tiny.module(warm_model, probe=Probe(every=None))
    with pytest.raises(ValueError, match=r"got a mean difference of \d.* nats a token"):
        tiny.fit(tmp_path, prime, tiny.data(warm_model, engine=Stale()), 1)


def test_minibatches_without_a_term_do_not_step(model_folder, tmp_path):
    """DPO compares right and wrong responses to one prompt; where all are right there is nothing to learn, and weight
    decay and momentum alone must not move the PRM."""
    rollouts = tiny.data(model_folder)
    rollouts.verifiers.submit = lambda *_: done_with(1.0)
    decaying = {"prm_optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1.0), "prm_loss": alg.dpo}
    prime = tiny.module(model_folder, advantage=alg.reinforce, **decaying)
    prime.configure_model()
    before = {role: weights(prime, role) for role in ("prm", "policy")}
    tiny.fit(tmp_path, prime, rollouts, 2)
    assert moved(prime, "prm", before["prm"]) == 0
    assert moved(prime, "policy", before["policy"]) > 0


def done_with(score):
    done = Future()
    done.set_result(Verdict.of_score(score))
    return done
