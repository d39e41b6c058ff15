"""What a model's configuration says about its size, and what one micro-batch of it keeps alive.

Nothing is loaded. The model is built without storage (meta device, fake tensors), so that tied embeddings and every
architecture of transformers are right by construction; a forward and backward over fake tensors runs the code that
training runs, and its live bytes are counted.
"""

from __future__ import annotations

import copy
import functools
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prime_lightning.models.attention import check_attention
from prime_lightning.models.head import chosen_logprobs, projection
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.models.pretrained import base_of

ROW = 128  # tokens; attention in blocks keeps the same for many short rows as for few long ones
FEW = 4  # layers that are counted one by one; even, for models whose layers alternate


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a causal LM that memory and time depend on."""

    parameters: int
    """All of them, tied ones once."""
    lookup: int
    """Of an input embedding that is not tied to the head: it is read, not multiplied."""
    largest_unit: int
    """Of the largest layer, which strategies that shard gather as a whole."""
    layers: int
    hidden: int
    vocabulary: int
    cache_width: int
    """Numbers that a token leaves in the cache of keys and values, all layers together."""


def read_config(name: str, file: str | None = None) -> PretrainedConfig:
    """The configuration of a model, from a folder, the hub, or a file that stands for it.

    Raises:
        ValueError: if there is none.
    """
    try:
        if file is None:
            return AutoConfig.from_pretrained(base_of(name))  # type: ignore[no-any-return]
        values = json.loads(Path(file).read_text())
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Expected the configuration of {name!r} {'in ' + file if file else 'as a folder or on the hub'}, got: "
            f"{str(error).splitlines()[0]}. Where the hub cannot be reached, give the model's config.json by "
            "--model-config."
        ) from error


def shape_of(config: PretrainedConfig, attention: str | None = None) -> Shape:
    """Count a model on the meta device.

    Raises:
        ValueError: if this kind of attention is given, and not enough for the model.

    Example:
        >>> from transformers import Qwen2Config
        >>> tied = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...             num_key_value_heads=1, vocab_size=10, tie_word_embeddings=True)
        >>> shape = shape_of(Qwen2Config(**tied))
        >>> shape.parameters, shape.lookup, shape.cache_width
        (1304, 0, 16)
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if attention is not None:
        check_attention(model, attention)
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers = [block for block in model.modules() if isinstance(block, nn.ModuleList)]
    units = [sum(p.numel() for p in layer.parameters()) for block in layers for layer in block]
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        lookup=0 if embedding is head else embedding.numel(),
        largest_unit=max(*units, embedding.numel()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        cache_width=2 * text.num_hidden_layers * heads * head_width,
    )


def adapter_parameters(config: PretrainedConfig, rank: int, targets: str | list[str] = "all-linear") -> int:
    """Parameters of low-rank adapters, `rank * (inputs + outputs)` for each matrix (LoRA, arXiv 2106.09685).

    Args:
        config: Of the model.
        rank: Of the adapters.
        targets: Last names of the matrices, or `all-linear` for all but the head; a pattern counts as `all-linear`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = [
        matrix
        for name, matrix in matrices.items()
        if matrix is not model.get_output_embeddings() and (isinstance(targets, str) or name.split(".")[-1] in targets)
    ]
    return sum(rank * (matrix.in_features + matrix.out_features) for matrix in chosen)


@functools.lru_cache(maxsize=64)
def _work(
    config: str, tokens: int, chunk: int, weights: torch.dtype, head: str | None, autocast: bool, checkpointing: bool
) -> int:
    """Peak of live bytes in one forward and backward, weights and their gradients left out."""
    values = json.loads(config)
    with FakeTensorMode(), torch.device("cpu"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), dtype=weights)
        model = _without_gradients(made.train(), checkpointing)
        scoring = ScoringLM(model, chunk_tokens=chunk, head_dtype=head)
        tokens_bl = torch.zeros(-(-tokens // ROW), min(ROW, tokens), dtype=torch.long)
        peak = Peak()
        with peak, torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            hidden_nH = model.base_model(input_ids=tokens_bl, use_cache=False).last_hidden_state.flatten(0, 1)
            scoring.head_scores(hidden_nH, tokens_bl.flatten(), 1.0, "measured")[0].sum().backward()
    return peak.bytes


def work_bytes(
    config: PretrainedConfig,
    tokens: int,
    chunk: int,
    weights: torch.dtype,
    *,
    autocast: bool,
    checkpointing: bool,
    head: str | None = None,
) -> int:
    """Bytes that a forward and backward of one micro-batch needs at its peak, besides weights and gradients.

    Not a formula but a count: the training code runs over fake tensors (as torch.compile does), and every storage is
    counted from its making to its end. It holds activations kept for the backward pass, gradients of activations, bf16
    copies of weights under autocast, and the logits of a chunk.

    Args:
        config: Of the model.
        tokens: Of the micro-batch, padding counted.
        chunk: Tokens projected onto the vocabulary at a time.
        weights: Type of the weights.
        autocast: Whether products are computed in bfloat16.
        checkpointing: Whether activations are computed again in the backward pass.
        head: Type of the projection onto the vocabulary, where it has one of its own.
    """
    layers: int = config.get_text_config().num_hidden_layers

    def count(of_layers: int) -> int:
        return _work(_shallow(config, of_layers), tokens, chunk, weights, head, autocast, checkpointing)

    if layers <= FEW:
        return count(layers)
    few, half = count(FEW), count(FEW // 2)  # each further layer adds the same
    return few + (few - half) * (layers - FEW) // (FEW // 2)


def logits_bytes(shape: Shape, chunk: int, weights: torch.dtype, *, autocast: bool, head: str | None = None) -> int:
    """Bytes of the logits' part in `work_bytes`: one chunk `[n, V]`, its float32 copies and its gradients.

    With a `head` type of its own, the copy of the head's weight `[V, H]` in it, and that copy's gradient, too.
    """
    with FakeTensorMode(), torch.device("cpu"):
        width = shape.hidden if head else 1
        linear = nn.Linear(width, shape.vocabulary, bias=False, dtype=weights)
        hidden = torch.zeros(chunk, width, dtype=weights, requires_grad=True)
        peak = Peak()
        with peak, torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            logits = projection(linear, getattr(torch, head))(hidden) if head else linear(hidden)
            chosen_logprobs(logits, torch.zeros(chunk, dtype=torch.long), entropy="measured")[0].sum().backward()
    return peak.bytes


def _shallow(config: PretrainedConfig, layers: int) -> str:
    """The configuration with its first layers only, as JSON."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return json.dumps(cut.to_dict(), default=str)


def _without_gradients(model: PreTrainedModel, checkpointing: bool) -> PreTrainedModel:
    """The model, with the gradients of its weights dropped as soon as they are there: they are counted elsewhere."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class Peak(TorchDispatchMode):
    """Greatest sum of the bytes of storages that were made inside and were alive at the same time.

    Example:
        >>> with Peak() as peak:
        ...     a = torch.zeros(1000, dtype=torch.uint8) + 1
        >>> peak.bytes
        2000
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._alive: dict[int, int] = {}
        self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)
