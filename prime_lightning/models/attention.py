"""Rows of different lengths as one row without padding, and attention over it that needs no package beside torch.

Responses to one prompt may share it: its tokens stand in the row once, before the first of them, and all of them see
it. For a prompt of P tokens and K responses of T each, that is P + K T tokens to compute instead of K (P + T).

transformers finds a kind of attention by its name. `varlen` takes a `Sequences` along with the forward, so that nothing
is found out again in every layer, builds no mask, and runs
- on CUDA, in half precision: torch's own flash attention for sequences of different lengths (torch 2.12 or newer);
- elsewhere: torch's `scaled_dot_product_attention`, one sequence at a time.

Both are the same sums. Nobody has run the first on a GPU yet. `sdpa_in_groups` is for sampling on a CPU.

Shapes: B responses, L prompt and response tokens, X tokens of the packed row, Y keys, S sequences, q queries and k keys
of one sequence, H heads, D numbers of a head.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested


@dataclass(frozen=True)
class Sequences:
    """Attention within a packed row: the queries of a sequence are the last of its keys, and attention is causal."""

    queries: tuple[int, ...]
    """Tokens of each sequence that ask."""
    keys: tuple[int, ...]
    """Tokens that the last of them sees."""
    query_starts: Tensor
    """`[S + 1]`, int32: where the queries of each sequence begin in the row, and the row's end."""
    key_starts: Tensor
    """The same for the keys."""
    key_Y: Tensor | None = None
    """Token of the row that each key is; None where keys are the queries."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | None = None) -> Sequences:
        """Sequences that lie one behind another and see nothing else.

        Example:
            >>> Sequences.of((2, 3)).query_starts
            tensor([0, 2, 5], dtype=torch.int32)
        """
        starts = _starts(lengths, device)
        return cls(lengths, lengths, starts, starts)


@dataclass(frozen=True)
class Packed:
    """A batch as one row."""

    tokens_X: Tensor
    positions_X: Tensor
    """Number of each token in its own sequence, from 0."""
    place_BL: Tensor
    """Where each token of the batch stands in the row; means nothing in the padding."""
    sequences: Sequences


def pack(tokens_BL: Tensor, length_B: Tensor, prompt_length_B: Tensor | None = None) -> Packed:
    """Rows of these lengths one behind another.

    Args:
        tokens_BL: Padded on the right.
        length_B: Tokens of each row; best on the host, which then waits for no device.
        prompt_length_B: Tokens at the beginning of each row that stand in the packed row once if other rows begin with
            the same ones; None shares nothing.

    Example:
        >>> packed = pack(torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.tensor([3, 3]), torch.tensor([2, 2]))
        >>> packed.tokens_X, packed.positions_X
        (tensor([5, 6, 7, 8]), tensor([0, 1, 2, 2]))
        >>> packed.sequences.queries, packed.sequences.keys, packed.sequences.key_Y
        ((3, 1), (3, 3), tensor([0, 1, 2, 0, 1, 3]))
    """
    B, L = tokens_BL.shape
    column_L, row_B = (torch.arange(n, device=length_B.device) for n in (L, B))
    real_BL = column_L < length_B[:, None]
    first_B = row_B if prompt_length_B is None else first_with_prompt(tokens_BL, prompt_length_B)
    own_BL = real_BL
    if prompt_length_B is not None:
        own_BL = real_BL & ((first_B == row_B)[:, None] | (column_L >= prompt_length_B[:, None]))
    row_X, positions_X = own_BL.nonzero(as_tuple=True)
    place_BL = own_BL.flatten().cumsum(0).view(B, L) - 1
    place_BL = place_BL.where(own_BL, place_BL[first_B])
    laid_out = (x.to(tokens_BL.device, non_blocking=True) for x in (row_X, positions_X, place_BL))
    there_X, positions_X, there_BL = laid_out
    queries, keys = own_BL.sum(1).tolist(), length_B.tolist()
    asking = [i for i, q in enumerate(queries) if q]
    sequences = Sequences.of(tuple(queries[i] for i in asking), tokens_BL.device)
    if prompt_length_B is not None:
        seen = tuple(keys[i] for i in asking)
        key_Y = place_BL[real_BL & own_BL.any(1)[:, None]].to(tokens_BL.device, non_blocking=True)
        sequences = replace(sequences, keys=seen, key_starts=_starts(seen, tokens_BL.device), key_Y=key_Y)
    return Packed(tokens_BL[there_X, positions_X], positions_X, there_BL, sequences)


def first_with_prompt(tokens_BL: Tensor, prompt_length_B: Tensor) -> Tensor:
    """Number of the first row, for each row, that begins with the same prompt.

    Example:
        >>> first_with_prompt(torch.tensor([[5, 6], [5, 7], [5, 8]]), torch.tensor([1, 2, 1]))
        tensor([0, 1, 0])
    """
    P = int(prompt_length_B.max())
    outside_BP = (torch.arange(P, device=prompt_length_B.device) >= prompt_length_B[:, None]).to(tokens_BL.device)
    group_B: Tensor = tokens_BL[:, :P].masked_fill(outside_BP, -1).unique(dim=0, return_inverse=True)[1]
    group_B = group_B.to(prompt_length_B.device)
    return (group_B[:, None] == group_B).int().argmax(1)


def _starts(lengths: tuple[int, ...], device: torch.device | None) -> Tensor:
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return starts if device is None else starts.to(device, non_blocking=True)


VARLEN = "varlen"
GROUPED = "sdpa_in_groups"
BLOCK = 512
"""Queries whose mask is built at a time, where one is needed."""
LAYERS = {"full_attention", "sliding_attention"}


@functools.cache
def varlen_of_torch() -> Callable[..., Tensor] | None:
    """`torch.nn.attention.varlen.varlen_attn`; None where torch has none that knows heads, scales and windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    complete = {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if complete else None  # type: ignore[return-value]  # torch 2.12


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequences: Sequences | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row, as transformers calls it.

    Args:
        module: The attention layer.
        query: `[1, H, X, D]`.
        key: `[1, H of keys, X, D]`.
        value: Like `key`.
        attention_mask: None: transformers makes no mask for a kind of attention that it does not know.
        dropout: 0.
        scaling: Of the products of queries and keys; `1 / sqrt(D)` by default.
        sliding_window: Keys that a query sees, its own among them; all by default.
        sequences: What belongs together.
        other: What else a layer says of itself.

    Returns:
        `[1, X, H, D]`, and no weights.

    Raises:
        ValueError: for attention that is more than that, or without `sequences`.
    """
    if sequences is None:
        raise ValueError(
            "Expected packed rows for the attention `varlen`, got none: set `loading.packed: true`, or take another "
            f"`loading.attention`. (Or {type(module).__name__} does not hand on what it is given.)"
        )
    more = [name for name in ("softcap", "s_aux", "position_bias") if other.get(name) is not None]
    if more or dropout or attention_mask is not None or not causal(module, other):
        raise ValueError(cannot(type(module).__name__, ", ".join(more) or "dropout, a mask or no causality"))
    device = query.device.type  # rotary embeddings leave queries and keys in float32 under autocast
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else value.dtype
    query_XHD, key_YHD, value_YHD = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    if sequences.key_Y is not None:
        key_YHD, value_YHD = key_YHD[sequences.key_Y], value_YHD[sequences.key_Y]
    flash = varlen_of_torch() if fits_flash(query_XHD, value_YHD) else None
    attended = one_by_one if flash is None else by_flash(flash)
    return attended(query_XHD, key_YHD, value_YHD, sequences, scaling, sliding_window)[None], None


def fits_flash(query_XHD: Tensor, value_XHD: Tensor) -> bool:
    """Whether flash attention has a kernel for these tensors."""
    return (
        query_XHD.is_cuda
        and torch.cuda.get_device_capability(query_XHD.device) >= (8, 0)
        and query_XHD.dtype in (torch.float16, torch.bfloat16)
        and query_XHD.shape[-1] == value_XHD.shape[-1] <= 256
        and query_XHD.shape[-1] % 8 == 0
    )


def by_flash(flash: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Flash attention of torch with the arguments of `one_by_one`."""

    def attended(
        query_XHD: Tensor, key_YHD: Tensor, value_YHD: Tensor, rows: Sequences, scale: float | None, window: int | None
    ) -> Tensor:
        longest = max(rows.keys)
        return flash(
            query_XHD,
            key_YHD,
            value_YHD,
            rows.query_starts,
            rows.key_starts,
            max(rows.queries),
            longest,
            scale=scale,
            window_size=(-1 if window is None or window >= longest else window - 1, 0),  # counts keys before one's own
            enable_gqa=query_XHD.shape[1] != key_YHD.shape[1],
        )

    return attended


def one_by_one(
    query_XHD: Tensor, key_YHD: Tensor, value_YHD: Tensor, rows: Sequences, scale: float | None, window: int | None
) -> Tensor:
    """`softmax(scale * query key^T) value` of each sequence, `[X, H, D]`.

    Example:
        >>> x = torch.ones(3, 1, 2)
        >>> one_by_one(x, x, x, Sequences.of((1, 2)), None, None).equal(x)
        True
    """
    parts = zip(
        query_XHD.transpose(0, 1).split(rows.queries, 1),
        key_YHD.transpose(0, 1).split(rows.keys, 1),
        value_YHD.transpose(0, 1).split(rows.keys, 1),
        strict=True,
    )
    return torch.cat([part for x in parts for part in _sequence(*x, scale, window)], 1).transpose(0, 1)


def _sequence(
    query_HqD: Tensor, key_HkD: Tensor, value_HkD: Tensor, scale: float | None, window: int | None
) -> list[Tensor]:
    """One sequence, in blocks of queries where not each sees all before it from the first key on."""
    q, k = query_HqD.shape[1], key_HkD.shape[1]
    if q == k and (window is None or window >= k):
        return [_attend(query_HqD, key_HkD, value_HkD, scale, None)]
    parts = []
    for block_HbD, end in zip(query_HqD.split(BLOCK, 1), [*range(k - q + BLOCK, k, BLOCK), k], strict=True):
        place_b = torch.arange(end - block_HbD.shape[1], end, device=query_HqD.device)[:, None]
        first = 0 if window is None else max(0, end - block_HbD.shape[1] - window + 1)
        place_k = torch.arange(first, end, device=query_HqD.device)
        seen_bk = place_k <= place_b
        if window is not None:
            seen_bk &= place_k > place_b - window
        parts.append(_attend(block_HbD, key_HkD[:, first:end], value_HkD[:, first:end], scale, seen_bk))
    return parts


def _attend(
    query_HqD: Tensor, key_HkD: Tensor, value_HkD: Tensor, scale: float | None, seen_qk: Tensor | None
) -> Tensor:
    return scaled_dot_product_attention(
        query_HqD[None],
        key_HkD[None],
        value_HkD[None],
        attn_mask=seen_qk,
        is_causal=seen_qk is None,
        scale=scale,
        enable_gqa=len(query_HqD) != len(key_HkD),
    )[0]


def packed_arguments(attention: str | None, sequences: Sequences) -> dict[str, Any]:
    """What a decoder is called with beside a packed row, so that no layer has to find it out from the positions."""
    if attention == VARLEN:
        return {"sequences": sequences}
    if is_flash_attention_requested(requested_attention_implementation=attention):
        return {
            "cu_seq_lens_q": sequences.query_starts,
            "cu_seq_lens_k": sequences.key_starts,
            "max_length_q": max(sequences.queries),
            "max_length_k": max(sequences.keys),
        }
    return {}  # a mask is made from the positions


def check_attention(model: PreTrainedModel, attention: str) -> None:
    """Refuse a model whose attention is more than this kind of attention computes.

    Raises:
        ValueError: and what else to take.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None and attention in (VARLEN, "sdpa"):
        raise ValueError(cannot(type(model).__name__, "soft caps", attention))  # which transformers' sdpa leaves out
    if attention != VARLEN:
        return
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    reasons = {
        "layers of the kinds " + ", ".join(sorted(kinds - LAYERS)): kinds - LAYERS,
        "a recurrent state": model._is_stateful,
        "attention in both directions": not causal(config, {}) or getattr(config, "use_bidirectional_attention", False),
        "attention of its own": not (model._supports_attention_backend and model._supports_flash_attn),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(cannot(type(model).__name__, " and ".join(found)))


def check_packed(model: PreTrainedModel) -> None:
    """Refuse packed rows for a model whose layers carry something from one token to the next beside attention.

    Raises:
        ValueError: for those.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if model._is_stateful or "conv" in kinds:
        raise ValueError(
            f"Expected a model of attention layers for `loading.packed: true`, got {type(model).__name__}, in which "
            "responses would run into one another. Set `loading.packed: false`."
        )


def cannot(name: str, what: str, attention: str = VARLEN) -> str:
    """Why a kind of attention is refused, and what to do."""
    return (
        f"Expected causal softmax attention for `attention: {attention}`, got {name}, which has {what}. Take "
        "`attention: flash_attention_2` (it needs the package flash-attn or kernels) or `eager`."
    )


def causal(owner: Any, said: dict[str, Any]) -> bool:
    """Whether a layer or a configuration is causal, as far as it says so."""
    found = said.get("is_causal")
    return bool(getattr(owner, "is_causal", True) if found is None else found)


def grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **other: Any
) -> tuple[Tensor, None]:
    """The attention `sdpa` of transformers, without copies of the cache for the heads that share keys and values.

    Where each row asks with one token (X = 1), the H / h heads that share a head of keys are as many queries of it, and
    torch takes keys `[R, h, positions, D]` as they lie. Elsewhere it is transformers' own.

    Returns:
        `[R, X, H, D]`, and no weights.
    """
    R, H, X, _ = query.shape
    if X > 1 or other.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **other)
    query_RhgD = query.reshape(R, key.shape[1], -1, query.shape[-1])
    seen = None if attention_mask is None else attention_mask.expand(-1, -1, query_RhgD.shape[2], -1)
    out_RhgD = scaled_dot_product_attention(query_RhgD, key, value, attn_mask=seen, scale=other.get("scaling"))
    return out_RhgD.reshape(R, 1, H, -1), None


AttentionInterface.register(VARLEN, varlen)
AttentionInterface.register(GROUPED, grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
