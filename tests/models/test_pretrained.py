"""Models and tokenizers from folders: what goes out comes back, and what is not there is named."""

import importlib.util
import json
import shutil

import pytest
import tiny
import torch
from toys import tiny_lm

from prime_lightning.engines.hf import HFEngine
from prime_lightning.models.pretrained import (
    base_of,
    ids_without_token,
    load_causal_lm,
    load_tokenizer,
    plain_folder,
    save,
)
from prime_lightning.models.prm_folder import write_model
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, build_tokenizer
from prime_lightning.sampling.datamodule import RolloutDataModule


def test_a_token_that_a_tokenizers_class_brings_along_is_not_written_as_the_models_own(chat_model, tmp_path):
    tokenizer, text = load_tokenizer(str(chat_model)), "<|user|>How many hens?<|end|>"
    rows = load_causal_lm(str(chat_model)).get_input_embeddings().num_embeddings
    assert max(tokenizer.get_vocab().values()) >= rows  # Qwen2's <|endoftext|>
    for generation in ("one", "two"):
        save(load_causal_lm(str(chat_model)), tokenizer, tmp_path / generation)
        again = load_tokenizer(str(tmp_path / generation))
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.chat_template == tokenizer.chat_template
        assert again.eos_token == tokenizer.eos_token
        tokenizer = again


@pytest.fixture
def folder(tmp_path, model_folder):
    """A copy that a test may break."""
    return shutil.copytree(model_folder, tmp_path / "model")


def test_a_saved_model_comes_back(tmp_path):
    model = tiny_lm(vocab_size=41, tie_word_embeddings=True)
    save(model, build_tokenizer(), tmp_path)
    loaded = load_causal_lm(str(tmp_path))
    assert loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in model.state_dict().items())
    text = "^5-8+7=7;4;#4"
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == build_tokenizer()(text)["input_ids"]
    assert len(load_tokenizer(str(tmp_path))) == len(build_tokenizer()) == 41


def test_dtype_and_attention_are_those_asked_for(folder):
    model = load_causal_lm(str(folder), dtype="bfloat16", attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
@pytest.mark.parametrize("name", ["runs/no_such_folder", "/no/such/folder", "nobody/nothing"])
def test_a_missing_folder_is_named(load, name):
    with pytest.raises(ValueError, match=f"Expected a folder or a Hugging Face id .* got '{name}': there is no such"):
        load(name)


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_an_empty_folder_is_named_with_what_is_in_it(load, tmp_path):
    with pytest.raises(ValueError, match=r"in the folder '.*', got \[\]"):
        load(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"Expected a tokenizer in the folder .*'config.json'.* no tokenizer files"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "no file named model.safetensors"),
        ("model.safetensors", 1000, "header|metadata"),
        ("config.json", 10, "not a valid JSON file"),
    ],
)
def test_a_folder_with_a_broken_file_is_refused(folder, name, content, message):
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[:content])
    with pytest.raises(ValueError, match=rf"Expected a causal language model in the folder .* got \[.*({message})"):
        load_causal_lm(str(folder))


def test_an_attention_that_is_not_installed_is_refused(folder):
    with pytest.raises(ValueError, match="nonsense"):
        load_causal_lm(str(folder), attention="nonsense")


@pytest.mark.parametrize(
    ("attention", "package"),
    [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_3"), ("a/kernel", "kernels")],
)
def test_a_package_that_attention_needs_is_named(folder, attention, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(
        ValueError, match=rf"packages .* `attention: {attention}` need, got: .*{package[:5]}(?i:)"
    ) as raised:
        load_causal_lm(str(folder), attention=attention)
    assert "`attention: varlen` with `packed: true` needs neither" in str(raised.value)
    assert "no such folder" not in str(raised.value)


# ---- tokenizer and embedding -----------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"got 41 rows .* 1 tokens .* beyond them, such as \['<think>'\]"):
        load_tokenizer(str(folder))
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        RolloutDataModule(str(folder), train=ArithmeticPrompts(), engine=HFEngine(device="cpu")).setup("fit")


def test_ids_without_a_token_are_counted(folder):
    assert ids_without_token(str(folder), load_tokenizer(str(folder))) == []
    model = load_causal_lm(str(folder))
    model.resize_token_embeddings(64)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    assert ids_without_token(str(folder), tokenizer) == list(range(41, 64))
    data = RolloutDataModule(str(folder), train=ArithmeticPrompts(), engine=HFEngine(device="cpu"))
    with pytest.warns(UserWarning, match=r"23 of the 64 ids of .* have no token \(from 41 on\)"):
        data.setup("validate")
    data.close()


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path, folder):
    """A folder with trained LoRA adapters, and the text-free model that it stands for."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = peft.get_peft_model(load_causal_lm(str(folder)), peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", model.merge_and_unload().eval()


def test_adapters_load_with_their_base(adapters):
    path, merged = adapters
    loaded = load_causal_lm(str(path)).eval()
    assert loaded.state_dict().keys() == merged.state_dict().keys()
    tokens = torch.tensor([[3, 4, 5, 6]])
    assert torch.allclose(loaded(tokens).logits, merged(tokens).logits, atol=1e-6)
    base = load_causal_lm(base_of(str(path))).eval()
    assert not torch.allclose(base(tokens).logits, merged(tokens).logits, atol=1e-2)
    assert load_tokenizer(str(path)).get_vocab() == build_tokenizer().get_vocab()


def test_a_base_is_found_beside_its_adapters(adapters, monkeypatch):
    path, _ = adapters
    facts = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**facts, "base_model_name_or_path": "../model"}))
    monkeypatch.chdir("/")
    assert load_causal_lm(str(path)).config.vocab_size == 41


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_model_name_or_path": None}, "`base_model_name_or_path`"),
        ({"base_model_name_or_path": "/no/such/model"}, "got '/no/such/model'"),
        ({"r": 8}, "adapters in .* that can be added"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(adapters, change, said):
    path, _ = adapters
    facts = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**facts, **change}))
    with pytest.raises(ValueError, match=said):
        load_causal_lm(str(path))


def test_a_run_from_adapters_samples_with_them_trains_them_and_writes_a_whole_model(adapters, tmp_path):
    path, merged = adapters
    rollouts = tiny.data(path)
    rollouts.setup("validate")
    engine = rollouts.engine.model.state_dict()
    assert all(torch.allclose(weight, engine[name], atol=1e-6) for name, weight in merged.state_dict().items())
    rollouts.close()
    module = tiny.module(path)
    tiny.fit(tmp_path, module, tiny.data(path), steps=1)
    with plain_folder(str(path)) as whole:
        written = load_causal_lm(whole).state_dict()
    assert all(torch.allclose(weight, written[name], atol=1e-6) for name, weight in merged.state_dict().items())
    target = tmp_path / "exported"
    write_model(target, str(path), ((n, p.detach()) for n, p in module.policy.model.named_parameters()))
    assert load_causal_lm(str(target)).state_dict().keys() == merged.state_dict().keys()
