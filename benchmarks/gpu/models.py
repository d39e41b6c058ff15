"""Random models of known shapes with a tokenizer of single characters, made on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen2Tokenizer

from prime_lightning.prompts.arithmetic import build_tokenizer

QWEN = {  # Qwen2.5-0.5B
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
SMOLLM = {  # SmolLM2-135M
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, int]]] = {
    "qwen": (Qwen2Config, QWEN),
    "smollm": (LlamaConfig, SMOLLM),
}


def write_model(folder: Path, name: str, *, tiny: bool) -> Path:
    """Write a freshly initialised model of this name's shape, or a tiny one of its kind, with its tokenizer."""
    kind, shape = CONFIGS[name]
    shape = TINY if tiny else shape
    tokenizer = full_tokenizer(shape["vocab_size"])
    config = kind(
        **shape,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def full_tokenizer(size: int) -> Qwen2Tokenizer:
    """The tokenizer of the arithmetic, with a name for each further token that a random model may sample."""
    vocabulary = dict(build_tokenizer().get_vocab())
    vocabulary |= {f"<{number}>": number for number in range(len(vocabulary), size)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token="<pad>", eos_token="<eos>", pad_token="<pad>")
