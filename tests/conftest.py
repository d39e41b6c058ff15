"""Fixtures of all tests: no network, no caches outside of pytest's folder, and one tiny model as a folder."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported

import datasets
import pytest
import tiny
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from prime_lightning.engines.hf import HFEngine
from prime_lightning.prompts.arithmetic import write_model

datasets.disable_progress_bars()
torch.set_num_threads(1)  # matrices this small gain nothing from more


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True)
def _as_loud_as_before():
    """Commands that run in the tests' process quieten other packages."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, bars = [logger.level for logger in loggers], transformers_logging.is_progress_bar_enabled()
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The arithmetic model, freshly initialised."""
    return str(write_model(tmp_path_factory.mktemp("model"), hidden_size=32))


@pytest.fixture(scope="session")
def sharp_folder(tmp_path_factory):
    """The same with large weights: its next-token distributions depend strongly on the context."""
    folder = write_model(tmp_path_factory.mktemp("sharp"), hidden_size=32)
    model = Qwen2ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def engine(sharp_folder):
    """A started engine; tests leave its weights as they are."""
    engine = HFEngine(batch_size=64, device="cpu")
    engine.start(sharp_folder)
    return engine


@pytest.fixture(scope="session")
def warm_model(tmp_path_factory):
    """A model that answers some of the two-step chains, for runs that need rewards of both kinds."""
    return tiny.warm(tmp_path_factory.mktemp("warm"))


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A random Qwen2 with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(["How many hens does a farmer have?"], vocab_size=400, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|system|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
