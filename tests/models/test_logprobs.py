"""`ScoringLM` and `ValueLM` against the model's own logits and states, one row at a time."""

import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from toys import tiny_lm
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from prime_lightning.models.head import chosen_logprobs
from prime_lightning.models.logprobs import ScoringLM, ValueLM, response_index

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


def scored(model, rows=None, temperature=1.0, entropy="trained", **options):
    """What `ScoringLM` says of them."""
    return ScoringLM(model, **options)(*(rows or batch()), temperature, entropy)


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
        assert_close(scored(model, batch(garbage=garbage), temperature, packed=packed), expected)


@kinds
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 4096])
def test_gradients_are_those_of_the_plain_model(kind, tied, packed, chunk_tokens):
    model = tiny_lm(kind, tie_word_embeddings=tied)
    expected = gradients(model, loss_of(*plain(model, *batch(), 0.7)))
    assert ("lm_head.weight" in expected) is not tied
    found = scored(model, temperature=0.7, chunk_tokens=chunk_tokens, packed=packed)
    assert_close(gradients(model, loss_of(*found)), expected, rtol=1e-4, atol=1e-4)


def test_the_soft_cap_of_the_logits_is_applied():
    model = tiny_lm("gemma2", attention="eager", final_logit_softcapping=2.0, attn_logit_softcapping=None)
    assert_close(scored(model), plain(model, *batch()))
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
    expected = gradients(plain_model, loss_of(*scored(plain_model)))
    assert_close(gradients(saving, loss_of(*scored(saving))), expected)


def test_scores_are_float32_under_bf16_and_near_those_of_fp32():
    model = tiny_lm()
    exact, _ = ScoringLM(model)(*batch())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = scored(model)
        loss_of(*mixed).backward()
    low = scored(tiny_lm().bfloat16())
    for logprobs_BT, entropy_BT in (mixed, low):
        assert logprobs_BT.dtype == entropy_BT.dtype == torch.float32
        assert_close(logprobs_BT, exact, rtol=0.1, atol=0.2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_lora_adapter_is_scored_and_trained():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base, model = tiny_lm(), peft.get_peft_model(tiny_lm(), config).eval()
    scores = scored(model)
    assert_close(scores, plain(model, *batch()))
    assert (scores[0] - ScoringLM(base)(*batch())[0]).abs().max() > 0.01
    trained = gradients(model, loss_of(*scores))
    assert trained
    assert all("lora_" in name for name in trained)
    with model.disable_adapter():
        assert_close(ScoringLM(model)(*batch()), ScoringLM(base)(*batch()))


@pytest.mark.parametrize("grad", [False, True])
def test_the_head_is_called_once_however_many_chunks(grad):
    """Strategies that shard gather its weights in hooks of its call, all ranks equally often."""
    model, calls = tiny_lm(), []
    scoring = ScoringLM(model, chunk_tokens=2)
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    with torch.set_grad_enabled(grad):
        scores, _ = scoring(*batch())
    if grad:
        scores.sum().backward()  # which computes the logits again
    assert calls == ["head"]


def test_an_open_head_is_a_head_as_before():
    model, twin = tiny_lm(), tiny_lm()
    ScoringLM(model)
    ScoringLM(model)  # as two roles around one model
    tokens = batch()[0]
    assert torch.equal(model(tokens).logits, twin(tokens).logits)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert isinstance(model.lm_head, torch.nn.Linear)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert scored(copied)[0].unique().numel() == 2  # all tokens alike, and 0 behind responses: the copy's own weights
    assert torch.equal(model(tokens).logits, twin(tokens).logits)


def test_an_error_inside_the_head_leaves_it_usable():
    model = tiny_lm()
    before = scored(model)
    with pytest.raises(TypeError):
        ScoringLM(model)(*batch(), "hot")  # which no logits are divided by
    assert_close(scored(model), before)


def test_threads_share_a_head():
    model, scoring = tiny_lm(), ScoringLM(tiny_lm(), chunk_tokens=1)
    tokens = batch()[0]
    expected = scoring(*batch())[0], scoring.model(tokens).logits
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        scores = [pool.submit(scoring, *batch()) for _ in range(20)]
        logits = [pool.submit(scoring.model, tokens) for _ in range(20)]
        assert all(torch.equal(one.result()[0], expected[0]) for one in scores)
        assert all(torch.equal(one.result().logits, expected[1]) for one in logits)
    assert torch.equal(expected[1], model(tokens).logits)


def test_entropy_is_computed_where_it_is_asked_for():
    model = tiny_lm()
    alone, nothing = scored(model, entropy="none")
    assert nothing is None
    (measured_BT, entropy_BT), (trained_BT, same_BT) = (scored(model, entropy=e) for e in ("measured", "trained"))
    assert torch.equal(alone, measured_BT)
    assert torch.equal(alone, trained_BT)
    assert torch.equal(entropy_BT, same_BT)
    assert not entropy_BT.requires_grad
    assert same_BT.requires_grad
    expected = gradients(model, alone.sum())
    assert_close(gradients(model, measured_BT.sum() + entropy_BT.sum()), expected, rtol=0, atol=0)


class Operations(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("entropy", "softmaxes"), [("none", 0), ("measured", 1), ("trained", 1)])
def test_the_passes_over_the_vocabulary_are_few(entropy, softmaxes):
    with Operations() as seen:
        chosen_logprobs(torch.randn(3, 29), torch.tensor([1, 2, 3]), 1.0, entropy)
    assert (seen.names["logsumexp"], seen.names["_softmax"], seen.names["div"]) == (1, softmaxes, 0)


def test_rows_without_any_response_give_empty_scores():
    tokens_BL, prompt_length_B, _ = batch()
    rows = tokens_BL, prompt_length_B, torch.zeros(5, dtype=torch.long)
    logprobs_BT, entropy_BT = scored(tiny_lm(), rows)
    assert logprobs_BT.shape == entropy_BT.shape == (5, 0)


def test_chosen_logprobs_hold_in_the_extremes():
    logits_NV = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], dtype=torch.bfloat16)
    logprobs_N, entropy_N = chosen_logprobs(logits_NV, torch.tensor([0, 0]), entropy="measured")
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
    values_BT, nothing = critic(tokens_BL, prompt_length_B, response_length_B)
    expected_BT = torch.zeros_like(values_BT)
    for i, (p, r) in enumerate(zip(prompt_length_B.tolist(), response_length_B.tolist(), strict=True)):
        states_LH = model.model(tokens_BL[i : i + 1, : p + r]).last_hidden_state[0]
        for t in range(r):
            expected_BT[i, t] = states_LH[p + t - 1] @ critic.head.weight[0]
    assert_close(values_BT, expected_BT)
    assert nothing is None  # a value has no entropy
    trained = gradients(critic, values_BT.sum())
    assert "head.weight" in trained
    assert not any("lm_head" in name for name, _ in critic.named_parameters())
