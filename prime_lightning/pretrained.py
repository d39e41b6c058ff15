"""Load Hugging Face models and tokenizers, with errors that say what to do; save them again.

A name is a hub id or a folder, as everywhere in `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prime_lightning.attention import check_attention
from prime_lightning.guests import GuestBar


def load_causal_lm(name: str, *, dtype: str = "float32", attention: str = "sdpa") -> PreTrainedModel:
    """A causal LM in training mode, which gradient checkpointing needs, without dropout.

    A token's log-prob must not differ between two passes: ratios and rewards are differences of such passes.

    Raises:
        ValueError: if there is no such folder or hub id, or it holds no causal LM; if a package is missing that the
            attention needs, or the model needs more than this attention.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), attn_implementation=attention, tqdm_class=GuestBar
        )
    except ImportError as error:
        raise ValueError(_not_installed(attention, error)) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(_missing("causal language model", name, error)) from error
    check_attention(model, attention)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model.train()  # type: ignore[no-any-return]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ValueError: if there is no such folder or hub id, or it holds no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise ValueError("it has no tokenizer files")  # transformers makes up an empty tokenizer then
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_missing("tokenizer", name, error)) from error
    return tokenizer


def check_same_vocabulary(role: str, name: str, other_role: str, other_name: str) -> None:
    """Refuse two models that would read the same tokens differently.

    Raises:
        ValueError: if their tokenizers have different vocabularies.
    """
    if name != other_name and load_tokenizer(name).get_vocab() != load_tokenizer(other_name).get_vocab():
        raise ValueError(
            f"Expected the {role} to have the {other_role}'s tokenizer, since they score the same tokens; got "
            f"{name!r} and {other_name!r} with different vocabularies."
        )


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model, with these weights or its own, and its tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def _not_installed(attention: str, error: ImportError) -> str:
    return (
        f"Expected the packages that this model and `attention: {attention}` need, got: {str(error).splitlines()[0]} "
        "flash_attention_2 is in the package flash-attn, which is compiled at its installation; the package kernels "
        "fetches kinds with a slash. `attention: varlen` with `packed: true` needs neither."
    )


def _missing(what: str, name: str, error: Exception) -> str:
    path = Path(name)
    if path.is_dir():
        return f"Expected a {what} in the folder {name!r}, got {sorted(p.name for p in path.iterdir())[:8]}: {error}"
    return (
        f"Expected a folder or a Hugging Face id with a {what}, got {name!r}: there is no such folder here, and the "
        f"hub did not give it ({str(error).splitlines()[0]})."
    )
