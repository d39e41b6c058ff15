"""Adapters: merged weights against peft's own merge, and a run that learns, syncs, resumes and exports with them."""

import builtins
import copy
import json
from concurrent.futures import Future

import lightning.pytorch as pl
import peft
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from prime_lightning.models.lora import adapter_config, adapter_parameters, merged_parameters, with_adapters
from prime_lightning.models.options import Loading, Lora
from prime_lightning.models.pretrained import load_causal_lm, load_tokenizer, save
from prime_lightning.rollout import Prompt, Sampling, Verdict
from prime_lightning.sampling.sync import PolicyWeights
from prime_lightning.training.callbacks.outputs import HuggingFaceExport
from prime_lightning.verifiers import Verifiers

LORA = Lora(rank=4, alpha=8.0)


def small(tied=False, seed=0):
    config = Qwen2Config(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)


def trained(lm, lora, seed=1):
    """Adapters that change something."""
    model = with_adapters(lm, lora, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


TARGETS = st.sampled_from(
    ["all-linear", ["q_proj"], ["v_proj", "down_proj"], r".*layers\.1.*up_proj", ["embed_tokens"]]
)


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "down_proj"], r".*layers\.1.*up_proj"])
def test_adapters_alone_are_what_peft_writes(tmp_path, targets):
    model = trained(small(), Lora(rank=3, alpha=5.0, rslora=True, target_modules=targets))
    model.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "adapter_model.safetensors"), dict(adapter_parameters(model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, value in adapter_config(model).items():
        assert value == said[name] or set(value) == set(said[name])
    assert adapter_config(small()) is None


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.floats(0.1, 64), st.booleans(), TARGETS, st.booleans())
def test_merged_weights_are_those_of_peft(rank, alpha, rslora, targets, tied):
    tied = tied and targets != ["embed_tokens"]
    model = trained(small(tied), Lora(rank=rank, alpha=alpha, rslora=rslora, target_modules=targets))
    before = copy.deepcopy(model.state_dict())
    ours = dict(merged_parameters(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # nothing was changed
    theirs = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert ours.keys() == theirs.keys() == dict(small(tied).named_parameters()).keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)
    assert not any(tensor.requires_grad for tensor in ours.values())
    asked: list[torch.Size] = []
    gathered = dict(merged_parameters(model, lambda parameter: asked.append(parameter.shape) or parameter.detach()))
    assert all(torch.equal(gathered[name], tensor) for name, tensor in theirs.items())
    assert sorted(asked) == sorted(parameter.shape for parameter in model.parameters())  # each once, one by one


def test_only_one_merged_weight_exists_at_a_time():
    lm = small()
    model = trained(lm, LORA)
    plain = {parameter.data_ptr() for parameter in model.parameters()}
    fresh = [name for name, tensor in merged_parameters(model) if tensor.data_ptr() not in plain]
    assert len(fresh) == 2 * 7  # the linear layers of two blocks; all else is the model's own memory


def test_without_adapters_the_weights_are_the_models_own():
    lm = small()
    assert with_adapters(lm, None, 0) is lm
    for (name, tensor), (own, parameter) in zip(merged_parameters(lm), lm.named_parameters(), strict=True):
        assert name == own
        assert tensor.data_ptr() == parameter.data_ptr()


def test_fresh_adapters_change_nothing_and_depend_on_the_seed_alone():
    tokens = torch.arange(8)[None]
    expected = small()(tokens).logits
    one, other = with_adapters(small(), LORA, 5), with_adapters(small(), LORA, 5)
    torch.testing.assert_close(one(tokens).logits, expected)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == ("lora_" in name)


def test_a_bfloat16_base_is_merged_in_float32():
    model = trained(small().bfloat16(), LORA)
    ours = dict(merged_parameters(model))
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight.float() + 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert ours[name].dtype == torch.float32
    torch.testing.assert_close(ours[name], expected)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_on_tied_embeddings_are_refused(target):
    with pytest.raises(ValueError, match="without the tied embeddings"):
        with_adapters(small(tied=True), Lora(target_modules=[target]), 0)


def test_targets_that_do_not_exist_and_ranks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no_such_layer"):
        with_adapters(small(), Lora(target_modules=["no_such_layer"]), 0)
    with pytest.raises(ValueError, match="LoRA `rank` of at least 1, got 0"):
        Lora(rank=0)


def test_without_peft_the_message_says_what_to_install(monkeypatch, model_folder):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'pip install "prime-lightning\[lora\]"') as raised:
        tiny.module(model_folder, policy_lora=LORA).configure_model()
    assert len(str(raised.value).splitlines()) == 2


# ---- a run


def pieces(model, **options):
    settings = {"policy_lora": LORA, "prm_lora": LORA, "policy_optimizer": tiny.adam(1e-2), **options}
    return tiny.module(model, **settings), tiny.data(model)


@pytest.fixture(scope="module")
def run(warm_model, tmp_path_factory):
    """Four iterations with adapters, a checkpoint after two of them, both models exported."""
    folder = tmp_path_factory.mktemp("lora")
    save = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    merged = HuggingFaceExport(str(folder), ["policy", "prm"])
    alone = HuggingFaceExport(str(folder / "alone"), ["policy"], adapters=True)
    history = tiny.History()
    prime, rollouts = pieces(warm_model)
    rollouts.close = lambda: None  # the engine stays for the tests
    trainer = tiny.trainer(folder, 4, save, merged, alone, history=history)
    trainer.fit(prime, rollouts)
    return folder, trainer, prime, rollouts, history


def test_only_adapters_are_trained_and_they_move(run, warm_model):
    _, trainer, prime, _, history = run
    original = load_causal_lm(str(warm_model)).state_dict()
    for role in ("policy", "prm"):
        state = getattr(prime, role).model.get_base_model().state_dict()
        for name, tensor in state.items():
            if "lora_B" in name:
                assert tensor.abs().max() > 0, name
            elif "lora_A" not in name:
                assert torch.equal(tensor, original[name.replace(".base_layer", "")]), name
    sizes = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in trainer.optimizers]
    assert all(0 < size < sum(t.numel() for t in original.values()) / 2 for size in sizes)
    assert all(row["policy/grad_norm"] > 0 for row in history.rows)


def test_the_engine_samples_from_the_adapted_policy(run, warm_model):
    _, trainer, prime, rollouts, _ = run
    assert rollouts.engine.version == trainer.global_step == 4
    lm = prime.policy.model.eval()
    prompts = [rollouts.train.prompt(draw, load_tokenizer(str(warm_model))) for draw in range(8)]
    for prompt, (done,) in rollouts.engine.stream(prompts, Sampling(samples=1, max_tokens=8, temperature=0.0)):
        with torch.no_grad():
            logits = lm(torch.tensor([[*prompt.token_ids, *done.token_ids]])).logits[0, len(prompt.token_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == done.token_ids
        expected = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-5, rtol=0)


def test_each_batch_was_sampled_from_the_policy_of_its_iteration(run):
    assert all(row["importance/abs_diff_max"] < 1e-4 for row in run[4].rows)


def test_resume_is_bit_equal(run, warm_model, tmp_path):
    folder, _, prime, _, history = run
    again, rollouts = pieces(warm_model)
    more = tiny.History()
    tiny.trainer(tmp_path, 4, history=more).fit(again, rollouts, ckpt_path=folder / "step=2.ckpt")
    assert more.rows == history.rows[2:]
    for (name, a), (_, b) in zip(prime.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_exported_folders_load_without_and_with_adapters(run):
    folder, _, prime, _, _ = run
    tokens = torch.arange(2, 12)[None]
    for role in ("policy", "prm"):
        loaded = load_causal_lm(str(folder / role))
        assert not (folder / role / "adapter_config.json").exists()
        torch.testing.assert_close(loaded(tokens).logits, getattr(prime, role).model(tokens).logits)
        assert load_tokenizer(str(folder / role)).get_vocab()
    alone = AutoModelForCausalLM.from_pretrained(folder / "alone" / "policy")  # transformers finds the base by its name
    torch.testing.assert_close(alone(tokens).logits, prime.policy.model(tokens).logits)


def test_a_reference_of_the_same_name_is_the_policy_without_adapters(warm_model, tmp_path):
    prime, rollouts = pieces(warm_model, reference=str(warm_model))
    history = tiny.fit(tmp_path, prime, rollouts, 2)
    assert not list(prime.reference.parameters())
    assert all(p.requires_grad == ("lora_" in name) for name, p in prime.policy.named_parameters())
    batch = history.outputs[-1].batch
    other = tiny.module(warm_model, reference=str(warm_model))
    other.configure_model()
    inputs = batch.tokens_BL, batch.prompt_length_B, batch.response_length_B
    with torch.no_grad():
        torch.testing.assert_close(prime.reference(*inputs)[0], other.reference(*inputs)[0])
        assert (prime.reference(*inputs)[0] - prime.policy(*inputs)[0]).abs().max() > 1e-3


def test_merged_folders_of_plain_models_are_as_before(tmp_path, warm_model):
    lm, tokenizer = load_causal_lm(str(warm_model)), load_tokenizer(str(warm_model))
    save(lm, tokenizer, tmp_path, dict(merged_parameters(lm)))
    assert all(
        torch.equal(a, b) for a, b in zip(load_causal_lm(str(tmp_path)).parameters(), lm.parameters(), strict=True)
    )


def test_the_policys_weights_are_the_merged_ones(warm_model):
    prime = tiny.module(warm_model, policy_lora=LORA)
    prime.configure_model()
    names = dict(load_causal_lm(str(warm_model)).named_parameters()).keys()
    assert dict(PolicyWeights(prime.policy.model).merged()).keys() == names
    assert isinstance(prime.policy.model, peft.PeftModel)


class Sevens(Verifiers):
    """A task that any model can learn: a quarter of a point for each 7, four at most."""

    def submit(self, prompt: Prompt, text: str) -> Future[Verdict]:
        done: Future[Verdict] = Future()
        done.set_result(Verdict.of_score(min(1.0, text.count("7") / 4)))
        return done


def test_a_run_with_adapters_learns(model_folder, tmp_path):
    prime = tiny.module(model_folder, policy_lora=LORA, prm_lora=LORA, policy_optimizer=tiny.adam(1e-2))
    rollouts = tiny.data(model_folder, verifiers=Sevens(), prompts_per_batch=16, engine=tiny.HFEngine(batch_size=128))
    scores = [row["rollout/accuracy"] for row in tiny.fit(tmp_path, prime, rollouts, 15).rows]
    assert sum(scores[-5:]) > 2 * sum(scores[:5])


def test_adapters_on_a_checkpointed_bfloat16_base(warm_model, tmp_path):
    loading = Loading(dtype="bfloat16", gradient_checkpointing=True, packed=True, attention="eager")
    prime, rollouts = pieces(warm_model, loading=loading)
    (row,) = tiny.fit(tmp_path, prime, rollouts, 1).rows
    assert row["policy/grad_norm"] > 0
    assert row["importance/abs_diff"] < 0.05  # the engine's float32 sums of the same bfloat16 weights
    assert {p.dtype for p in prime.policy.parameters() if p.requires_grad} == {torch.float32}
