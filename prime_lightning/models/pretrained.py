"""Load Hugging Face models and tokenizers, with errors that say what to do; save them again.

A name is a hub id or a folder, as everywhere in `transformers`. A folder of LoRA adapters (`adapter_config.json`)
stands for the model that they were trained on, with the adapters added.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from prime_lightning.models.attention import check_attention
from prime_lightning.models.third_party_bars import ThirdPartyBar

TOKENIZER_FILES = (
    "tokenizer.json",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
)


def load_causal_lm(name: str, *, dtype: str = "float32", attention: str = "sdpa") -> PreTrainedModel:
    """A causal LM in training mode, which gradient checkpointing needs, without dropout.

    A token's log-prob must not differ between two passes: ratios and rewards are differences of such passes.

    Raises:
        ValueError: if there is no such folder or hub id, or it holds no causal LM; if a package is missing that the
            attention needs, or the model needs more than this attention.
    """
    base = base_of(name)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, dtype, dtype), attn_implementation=attention, tqdm_class=ThirdPartyBar
        )
    except ImportError as error:
        raise ValueError(_not_installed(attention, error)) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(_missing("causal language model", base, error)) from error
    check_attention(model, attention)
    if base != name:
        model = _with_adapters(model, name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model.train()  # type: ignore[no-any-return]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; of the model below, for adapters that come without one.

    Raises:
        ValueError: if there is no such folder or hub id, it holds no tokenizer, or one with more tokens than the model.
    """
    tokenizer = _read_tokenizer(name)
    rows = embedding_rows(name)
    beyond = [token for token, i in tokenizer.get_vocab().items() if rows is not None and i >= rows]
    beyond = [token for token in beyond if _of_files(name, token)]  # not those that a tokenizer class brings along
    if beyond:
        raise ValueError(
            f"Expected a row of the embedding for each token, got {rows} rows in {base_of(name)!r} and {len(beyond)} "
            f"tokens of the tokenizer beyond them, such as {beyond[:3]}. Take the model's own tokenizer, or make rows "
            "for them: `model.resize_token_embeddings(len(tokenizer))`, then save both into one folder."
        )
    return tokenizer


def _read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise ValueError("it has no tokenizer files")  # transformers makes up an empty tokenizer then
    except (OSError, ValueError, KeyError) as error:
        base = base_of(name)
        if base != name:
            return _read_tokenizer(base)
        raise ValueError(_missing("tokenizer", name, error)) from error
    return tokenizer


def _of_files(name: str, token: str) -> bool:
    """Whether a token stands in the files of a tokenizer."""
    files = (cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZER_FILES)
    return any(
        json.dumps(token, ensure_ascii=False) in Path(file).read_text(encoding="utf-8") for file in files if file
    )


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model, or of the base of adapters.

    Raises:
        ValueError: if there is no such folder or hub id.
    """
    try:
        return AutoConfig.from_pretrained(base_of(name))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_missing("model", name, error)) from error


def embedding_rows(name: str) -> int | None:
    """Rows of a model's embedding by its configuration; None where there is none to be read."""
    try:
        config = load_config(name)
    except ValueError:
        return None
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return int(rows) if rows is not None else None


def ids_without_token(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the model has and the tokenizer has not, since embeddings are padded; they decode to nothing."""
    rows = embedding_rows(name) or 0
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))


def ids_with_token(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The other ids of the model, where `ids_without_token` finds any; else none."""
    unused = set(ids_without_token(name, tokenizer))
    return [i for i in range(embedding_rows(name) or 0) if i not in unused] if unused else []


def warn_of_padding(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say how many ids without a token the model could draw."""
    if unused := ids_without_token(name, tokenizer):
        warnings.warn(
            f"{len(unused)} of the {embedding_rows(name)} ids of {name!r} have no token (from {unused[0]} on). A model "
            "that was trained with them hardly draws them; ids of completions that decode to nothing are of these. "
            "`mask_padding: true` (`data.sampling`, `evaluate --mask_padding`) keeps them from being drawn.",
            stacklevel=2,
        )


def base_of(name: str) -> str:
    """The model that a folder (or hub id) of adapters was trained on; the name itself for any other.

    Raises:
        ValueError: if the adapters do not say.
    """
    folder = Path(name)
    found = folder / "adapter_config.json" if folder.is_dir() else _adapters_on_hub(name)
    if found is None or not found.is_file():
        return name
    base = json.loads(found.read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"Expected `base_model_name_or_path` in {str(found)!r}, got none. Write it there, or merge them."
        )
    beside = folder / base
    return str(beside) if folder.is_dir() and not Path(base).exists() and beside.is_dir() else str(base)


def _adapters_on_hub(name: str) -> Path | None:
    if Path(name).is_absolute() or name.count("/") > 1:
        return None
    try:
        found = find_adapter_config_file(name)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def _with_adapters(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model with the adapters of a folder added to its weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(
            f"Expected `peft` to be installed, since {name!r} holds adapters, got no such module.\n"
            'Install it: pip install "prime-lightning[lora]"'
        ) from None
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, name).merge_and_unload()  # type: ignore[operator]
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"Expected adapters in {name!r} that can be added to the weights of {base_of(name)!r}, got: "
            f"{str(error).splitlines()[0]}."
        ) from error
    return merged.requires_grad_(True)  # peft froze them


@contextmanager
def plain_folder(name: str) -> Iterator[str]:
    """A name that any engine can load: the same, or for adapters a folder with the sum, gone again afterwards.

    The copy is written where `TMPDIR` says, and as large as the model.
    """
    if base_of(name) == name:
        yield name
        return
    with tempfile.TemporaryDirectory(prefix="merged-") as folder:
        save(load_causal_lm(name, dtype="auto"), load_tokenizer(name), folder)
        yield os.fspath(folder)


def check_same_vocabulary(role: str, name: str, other_role: str, other_name: str) -> None:
    """Refuse two models that would read the same tokens differently.

    Raises:
        ValueError: if their tokenizers have different vocabularies.
    """
    if name != other_name and _read_tokenizer(name).get_vocab() != _read_tokenizer(other_name).get_vocab():
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
    if rows := embedding_rows(str(folder)):
        _leave_out_beyond(Path(folder), rows)


def _leave_out_beyond(folder: Path, rows: int) -> None:
    """Take tokens without a row out of a tokenizer's files: its class brings them along, and will again."""
    file, said = folder / "tokenizer.json", folder / "tokenizer_config.json"
    written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    added = written.get("added_tokens") or []
    beyond = [token["content"] for token in added if token["id"] >= rows]
    if not beyond:
        return
    written["added_tokens"] = [token for token in added if token["id"] < rows]
    named = {key: value for key, value in json.loads(said.read_text(encoding="utf-8")).items() if value not in beyond}
    for path, content in ((file, written), (said, named)):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


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
        f"Expected a folder or a Hugging Face id with a {what}, got {name!r}: there is no such folder here (in "
        f"{str(Path.cwd())!r}), and the hub did not give it ({str(error).splitlines()[0]})."
    )
