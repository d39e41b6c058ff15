"""Ids without a token: under the mask none is drawn, and the policy's log-probs are of the same distribution."""

import math
import warnings

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from prime_lightning.__main__ import main
from prime_lightning.engines.hf import HFEngine
from prime_lightning.evaluation.callback import Benchmarks
from prime_lightning.models.batch import Batch
from prime_lightning.models.head import chosen_logprobs
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.models.options import Lora
from prime_lightning.models.pretrained import ids_with_token, ids_without_token, load_causal_lm, load_tokenizer, save
from prime_lightning.rollout import Rollout, Sampling, Verdict
from prime_lightning.training.options import PolicyLoss, ProcessReward

TOKENS, ROWS = 41, 64


@pytest.fixture(scope="module")
def padded(warm_model, tmp_path_factory):
    """The warm model with 23 rows more than tokens, which are as likely as a digit is."""
    model, folder = load_causal_lm(str(warm_model)), tmp_path_factory.mktemp("padded")
    model.resize_token_embeddings(ROWS)
    head, noise = model.get_output_embeddings().weight.data, torch.Generator().manual_seed(0)
    head[TOKENS:] = head[5] + 0.3 * torch.randn(ROWS - TOKENS, head.shape[1], generator=noise)
    save(model, load_tokenizer(str(warm_model)), folder)
    return str(folder)


def groups_of(engine, prompts, sampling):
    return [
        [Rollout(prompt=prompt, completion=done, verdict=Verdict.of_score(1.0)) for done in group]
        for prompt, group in engine.stream(prompts, sampling)
    ]


def ids(groups):
    return {token for group in groups for rollout in group for token in rollout.completion.token_ids}


@pytest.mark.parametrize("change", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 50, "top_p": 0.99}])
def test_a_masked_id_is_never_drawn_and_the_policy_says_the_same(padded, change):
    engine, source = HFEngine(batch_size=32, device="cpu"), tiny.ArithmeticPrompts(seed=3, operations=2)
    engine.start(padded)
    prompts = [source.prompt(draw, engine.tokenizer) for draw in range(32)]
    options = {"samples": 4, "max_tokens": 8, **change}
    if change.get("temperature") != 0:
        assert max(ids(groups_of(engine, prompts, Sampling(**options)))) >= TOKENS
    masked = groups_of(engine, prompts, Sampling(**options, mask_padding=True))
    assert max(ids(masked)) < TOKENS
    if "top_p" in change:  # raises log-probs over the policy's
        return
    unused = ids_without_token(padded, engine.tokenizer)
    assert unused == list(range(TOKENS, ROWS))
    assert ids_with_token(padded, engine.tokenizer) == list(range(TOKENS))
    batch = Batch.of_groups(masked, temperature=change.get("temperature", 1.0), masked=True)
    lengths = batch.prompt_length_B, batch.response_length_B, batch.temperature
    scored_BT, _ = ScoringLM(engine.model, unused=unused)(batch.tokens_BL, *lengths, masked=True)
    assert_close(batch.behaviour_logprobs_BT, scored_BT, rtol=1e-4, atol=1e-4)
    own_BT, _ = ScoringLM(engine.model, unused=unused)(batch.tokens_BL, *lengths)
    assert bool((own_BT[batch.mask_BT] < scored_BT[batch.mask_BT]).all())


logits = st.lists(st.floats(-8, 8), min_size=2, max_size=9)


@settings(max_examples=200, deadline=None)
@given(logits, st.data(), st.floats(0.3, 2), st.sampled_from(["measured", "trained"]))
def test_masked_scores_are_those_of_the_other_logits_alone(values, data, temperature, entropy):
    """The slow way: leave the columns out. Log-prob, entropy and all gradients."""
    kept = sorted(data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1)))
    target = data.draw(st.sampled_from(range(len(kept))))
    whole = torch.tensor([values], dtype=torch.float32, requires_grad=True)
    mask_V = torch.ones(len(values), dtype=torch.bool)
    mask_V[kept] = False
    found = chosen_logprobs(whole, torch.tensor([kept[target]]), temperature, entropy, mask_V)
    alone = torch.tensor([[values[i] for i in kept]], dtype=torch.float32, requires_grad=True)
    expected = chosen_logprobs(alone, torch.tensor([target]), temperature, entropy)
    assert_close(found, expected)
    for one in (found, expected):
        (one[0] + (one[1] if entropy == "trained" else 0.0)).sum().backward()
    assert_close(whole.grad[:, kept], alone.grad)
    assert float(whole.grad[:, mask_V].abs().sum()) == 0


def test_a_masked_target_has_no_probability():
    mask_V = torch.tensor([False, True])
    assert chosen_logprobs(torch.zeros(1, 2), torch.tensor([1]), masked_V=mask_V)[0].item() == -math.inf


RUNS = [
    {"reference": True},
    {"reference": True, "policy_loss": PolicyLoss(kl="loss", kl_weight=0.1, entropy_weight=0.01)},
    {"reference": True, "policy_lora": Lora(rank=2)},
    {},
    {"policy_loss": PolicyLoss(proximal="engine")},
]


@pytest.mark.parametrize("options", RUNS)
def test_a_run_under_the_mask(padded, tmp_path, options):
    """Ratio and first gap are exact; the process reward is of the models' own log-probs, the KL of masked ones."""
    options = {**options, "reference": padded if options.get("reference") else None}
    rollouts = tiny.data(padded, sampling=Sampling(samples=4, max_tokens=8, mask_padding=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have no token")
        history = tiny.fit(tmp_path, tiny.module(padded, **options), rollouts, 2)
    for row, out in zip(history.rows, history.outputs, strict=True):
        tokens_BT = out.batch.response_tokens()[out.batch.mask_BT]
        assert int(tokens_BT.max()) < TOKENS
        assert row["importance/abs_diff"] < 1e-5
    assert float(history.outputs[0].process_BT.abs().max()) < 1e-5  # the PRM is the reference still
    assert all(math.isfinite(value) for row in history.rows for value in row.values())
    if options["reference"]:
        assert abs(history.rows[0]["policy/reference_kl"]) < 1e-6


def test_without_the_mask_ids_of_no_token_are_trained_on_and_the_warning_names_the_option(padded, tmp_path):
    steps = ProcessReward(granularity="step", step_separator=";")  # which decodes each of them
    with pytest.warns(UserWarning, match=r"23 of the 64 ids .* `mask_padding: true` \(`data.sampling`"):
        history = tiny.fit(tmp_path, tiny.module(padded, process_reward=steps), tiny.data(padded), 1)
    batch = history.outputs[0].batch
    assert int(batch.response_tokens()[batch.mask_BT].max()) >= TOKENS
    assert history.rows[0]["importance/abs_diff"] < 1e-5


class Asked(HFEngine):
    """Takes note of the option."""

    def stream(self, prompts, sampling, finished=None):
        self.asked = [*getattr(self, "asked", []), sampling.mask_padding]
        yield from super().stream(prompts, sampling, finished)


def test_benchmarks_take_the_mask(padded, tmp_path):
    callback = Benchmarks(str(tmp_path), ["arithmetic"], before=False, limit=8)
    sampling = Sampling(samples=4, max_tokens=8, mask_padding=True)
    rollouts = tiny.data(padded, sampling=sampling, engine=Asked())
    tiny.trainer(tmp_path, 1, callback).fit(tiny.module(padded), rollouts)
    assert rollouts.engine.asked[-2:] == [True, True]  # behind the probe, which looks at the model as it is
    command = ["evaluate", f"--model={padded}", "--benchmark=arithmetic", "--limit=8"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have no token")
        assert main([*command, f"--out={tmp_path}/masked", "--mask_padding=true"]) == 0
    with pytest.warns(UserWarning, match="`evaluate --mask_padding`"):
        assert main([*command, f"--out={tmp_path}/plain"]) == 0
