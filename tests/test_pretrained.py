"""Models and tokenizers from folders: what goes out comes back, and what is not there is named."""

import importlib.util
import shutil

import pytest
import torch
from toys import tiny_lm

from prime_lightning.arithmetic import build_tokenizer
from prime_lightning.pretrained import load_causal_lm, load_tokenizer, save


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
