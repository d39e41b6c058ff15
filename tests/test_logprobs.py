"""`ScoringLM` and `ValueLM` against the model's own logits and states, one row at a time."""

import pytest
import torch
from torch.testing import assert_close
from toys import tiny_lm
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from prime_lightning.logprobs import ScoringLM, ValueLM, chosen_logprobs, response_index

kinds = pytest.mark.parametrize("kind", ["qwen2", "llama"])
PROMPT, RESPONSE = torch.tensor([3, 1, 5, 2, 4]), torch.tensor([4, 6, 1, 0, 3])


def batch(*, garbage=0):
    """Ragged rows; the padding holds `garbage`."""
    lengths = (PROMPT + RESPONSE)[:, None]
    tokens = torch.randint(2, 29, (5, int(lengths.max())), generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(tokens.shape[1]) < lengths, tokens, garbage), PROMPT, RESPONSE


def plain(model, tokens_BL, prompt_length_B, response_length_B, temperature=1.0):
    """Log-probs and entropies by the definition."""
    logprobs_BT = torch.zeros(len(tokens_BL), int(response_length_B.max()))
    entropy_BT = torch.zeros_like(logprobs_BT)
    for i, (p, r) in enumerate(zip(prompt_length_B.tolist(), response_length_B.tolist(), strict=True)):
        logits_LV = model(tokens_BL[i : i + 1, : p + r]).logits[0].float()
        log_LV = (logits_LV / temperature).log_softmax(-1)
        for t in range(r):
            log_V = log_LV[p + t - 1]
            logprobs_BT[i, t] = log_V[tokens_BL[i, p + t]]
            entropy_BT[i, t] = -(log_V.exp() * log_V).sum()
    return logprobs_BT, entropy_BT


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(logprobs_BT, entropy_BT):
    """Each number with its own weight, so that a misplaced one shows."""
    weight_BT = torch.linspace(0.5, 2, logprobs_BT.numel()).reshape(logprobs_BT.shape)
    return (weight_BT * logprobs_BT).sum() - (weight_BT * entropy_BT).sum()


@kinds
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_the_plain_model(kind, packed, attention, temperature):
    model = tiny_lm(kind, attention=attention)
    expected = plain(model, *batch(), temperature)
    for garbage in (0, 7):
        assert_close(ScoringLM(model, packed=packed)(*batch(garbage=garbage), temperature), expected)


@kinds
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 4096])
def test_gradients_are_those_of_the_plain_model(kind, tied, packed, chunk_tokens):
    model = tiny_lm(kind, tie_word_embeddings=tied)
    expected = gradients(model, loss_of(*plain(model, *batch(), 0.7)))
    assert ("lm_head.weight" in expected) is not tied
    scoring = ScoringLM(model, chunk_tokens=chunk_tokens, packed=packed)
    assert_close(gradients(model, loss_of(*scoring(*batch(), 0.7))), expected, rtol=1e-4, atol=1e-4)


def test_the_soft_cap_of_the_logits_is_applied():
    model = tiny_lm("gemma2", attention="eager", final_logit_softcapping=2.0, attn_logit_softcapping=None)
    assert_close(ScoringLM(model)(*batch()), plain(model, *batch()))
    model.config.final_logit_softcapping = None
    uncapped, _ = plain(model, *batch())
    model.config.final_logit_softcapping = 2.0
    assert (ScoringLM(model)(*batch())[0] - uncapped).abs().max() > 0.5  # or the test above would show nothing


@pytest.mark.parametrize(
    ("model_class", "config", "name"),
    [
        (CohereForCausalLM, CohereConfig(vocab_size=29, hidden_size=16, num_hidden_layers=1), "logit_scale"),
        (
            GraniteForCausalLM,
            GraniteConfig(vocab_size=29, hidden_size=16, num_hidden_layers=1, logits_scaling=2.0),
            "logits_scaling",
        ),
    ],
)
def test_heads_that_scale_are_refused(model_class, config, name):
    config.num_attention_heads = config.num_key_value_heads = 2
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    with pytest.raises(ValueError, match=f"{model_class.__name__} with {name}="):
        ScoringLM(model_class(config))


def test_gradient_checkpointing_changes_nothing():
    plain_model, saving = tiny_lm().train(), tiny_lm().train()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradients(plain_model, loss_of(*ScoringLM(plain_model)(*batch())))
    assert_close(gradients(saving, loss_of(*ScoringLM(saving)(*batch()))), expected)


def test_scores_are_float32_under_bf16_and_near_those_of_fp32():
    model = tiny_lm()
    exact, _ = ScoringLM(model)(*batch())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ScoringLM(model)(*batch())
        loss_of(*mixed).backward()
    low = ScoringLM(tiny_lm().bfloat16())(*batch())
    for logprobs_BT, entropy_BT in (mixed, low):
        assert logprobs_BT.dtype == entropy_BT.dtype == torch.float32
        assert_close(logprobs_BT, exact, rtol=0.1, atol=0.2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_lora_adapter_is_scored_and_trained():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base, model = tiny_lm(), peft.get_peft_model(tiny_lm(), config).eval()
    scores = ScoringLM(model)(*batch())
    assert_close(scores, plain(model, *batch()))
    assert (scores[0] - ScoringLM(base)(*batch())[0]).abs().max() > 0.01
    trained = gradients(model, loss_of(*scores))
    assert trained
    assert all("lora_" in name for name in trained)
    with model.disable_adapter():
        assert_close(ScoringLM(model)(*batch()), ScoringLM(base)(*batch()))


def test_rows_without_any_response_give_empty_scores():
    tokens_BL, prompt_length_B, _ = batch()
    logprobs_BT, entropy_BT = ScoringLM(tiny_lm())(tokens_BL, prompt_length_B, torch.zeros(5, dtype=torch.long))
    assert logprobs_BT.shape == entropy_BT.shape == (5, 0)


def test_chosen_logprobs_hold_in_the_extremes():
    logits_NV = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], dtype=torch.bfloat16)
    logprobs_N, entropy_N = chosen_logprobs(logits_NV, torch.tensor([0, 0]))
    assert_close(logprobs_N, torch.tensor([0.0, -1000.0]))
    assert_close(entropy_N, torch.zeros(2))


def test_response_index_lists_rows_and_steps():
    rows_N, steps_N = response_index(PROMPT, RESPONSE)
    expected = [(i, t) for i, n in enumerate(RESPONSE.tolist()) for t in range(n)]
    assert list(zip(rows_N.tolist(), steps_N.tolist(), strict=True)) == expected


@kinds
@pytest.mark.parametrize("packed", [False, True])
def test_values_are_the_head_on_the_state_before_each_token(kind, packed):
    model = tiny_lm(kind)
    critic = ValueLM(model, packed=packed)
    assert critic(*batch())[0].abs().sum() == 0  # a new critic says 0
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    tokens_BL, prompt_length_B, response_length_B = batch(garbage=7)
    values_BT, twice_BT = critic(tokens_BL, prompt_length_B, response_length_B)
    expected_BT = torch.zeros_like(values_BT)
    for i, (p, r) in enumerate(zip(prompt_length_B.tolist(), response_length_B.tolist(), strict=True)):
        states_LH = model.model(tokens_BL[i : i + 1, : p + r]).last_hidden_state[0]
        for t in range(r):
            expected_BT[i, t] = states_LH[p + t - 1] @ critic.head.weight[0]
    assert_close(values_BT, expected_BT)
    assert_close(twice_BT, expected_BT)
    trained = gradients(critic, values_BT.sum())
    assert "head.weight" in trained
    assert not any("lm_head" in name for name, _ in critic.named_parameters())
