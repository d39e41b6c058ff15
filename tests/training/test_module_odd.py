"""What an iteration refuses, and completions without a token."""

import pytest
import tiny

from prime_lightning.models.batch import Batch
from prime_lightning.models.options import Loading
from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.rollout import Completion, Finish, Prompt, Rollout, Sampling, Verdict
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.training.options import PolicyLoss, Update


def test_kl_needs_a_reference(warm_model):
    with pytest.raises(ValueError, match="Expected a `reference` model for the KL penalty"):
        tiny.module(warm_model, policy_loss=PolicyLoss(kl="loss"))


def test_a_group_of_one_is_refused(warm_model, tmp_path):
    rollouts = tiny.data(
        warm_model,
        sampling=Sampling(samples=1, max_tokens=8),
        accuracy_filter=AccuracyFilter(low=0, high=1, min_valid=1),
    )
    with pytest.raises(ValueError, match=r"sampling\.samples"):
        tiny.fit(tmp_path, tiny.module(warm_model), rollouts, 1)


def test_more_minibatches_than_prompts_is_refused(warm_model, tmp_path):
    prime = tiny.module(warm_model, policy_update=Update(minibatches=5))
    with pytest.raises(ValueError, match="at least one prompt for each of 5 minibatches, got 4"):
        tiny.fit(tmp_path, prime, tiny.data(warm_model), 1)


def test_models_with_other_tokenizers_are_refused(warm_model, tmp_path):
    other = tiny.write_model(tmp_path / "other", hidden_size=32)
    tokenizer = load_tokenizer(str(other))
    tokenizer.add_tokens(["!"])
    tokenizer.save_pretrained(other)
    prime = tiny.module(warm_model, prm=str(other))
    with pytest.raises(ValueError, match="Expected the prm to have the policy's tokenizer"):
        prime.configure_model()


class Mute(tiny.HFEngine):
    """Says nothing at all, in some of its samples."""

    def stream(self, prompts, sampling, finished=None):
        for prompt, completions in super().stream(prompts, sampling, finished):
            nothing = Completion(text="", token_ids=[], logprobs=[], finish=Finish.STOP, versions=[])
            yield prompt, [nothing, nothing, *completions[2:]][: len(completions)]


@pytest.mark.parametrize("micro_tokens", [1, 512])
@pytest.mark.parametrize("packed", [False, True])
def test_empty_completions_are_responses_without_tokens(model_folder, tmp_path, micro_tokens, packed):
    update = Update(minibatches=2, micro_tokens=micro_tokens, grad_clip=10.0)
    rollouts = tiny.data(model_folder, engine=Mute(batch_size=32), oversample=2.0, surplus="keep")
    rollouts.verifiers.submit = tiny.parity
    options = {"policy_update": update, "prm_update": update, "loading": Loading(packed=packed)}
    history = tiny.fit(tmp_path, tiny.module(model_folder, reference=model_folder, **options), rollouts, 3)
    out = history.outputs[0]
    empty_B = out.batch.response_length_B == 0
    assert int(empty_B.sum()) == 8
    assert not out.batch.mask_BT[empty_B].any()
    assert out.advantage_BT.isfinite().all()
    assert history.rows[0]["policy/grad_norm"] > 0


def test_a_batch_of_empty_completions_alone_is_a_batch():
    done = Completion(text="", token_ids=[], logprobs=[], finish=Finish.STOP, versions=[])
    prompt = Prompt(draw=0, token_ids=(1, 2), text="", kind="exact")
    group = [Rollout(prompt=prompt, completion=done, verdict=Verdict.of_score(x)) for x in (0.0, 1.0)]
    batch = Batch.of_groups([group])
    assert batch.mask_BT.shape == (2, 0)
    assert batch.response_tokens().shape == (2, 0)
