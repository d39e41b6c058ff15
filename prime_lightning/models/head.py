"""The vocabulary head of a causal LM: log-probs of given tokens, and entropy, from last hidden states.

The projection onto the vocabulary is the memory peak of such training (tokens x 150,000 floats), so it is done in
chunks that are computed again in the backward pass; log-softmax is float32. The chunks lie inside one call of the head:
strategies that shard weights gather the head's in hooks of its call, and all ranks must gather equally often, however
many tokens each of them has. Fused kernels of other packages, which never have all logits, are in `fused.py`.

Shapes: N response tokens of all rows, n those of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prime_lightning.models.fused import FUSED, check_fused, fused_logprobs

Entropy = Literal["none", "measured", "trained", "likeliest"]
"""Not computed; computed without gradient; computed as a part of the graph; the log-prob of the likeliest token in its
place, without gradient."""
Kind = Literal["auto", "plain", "compile", "liger", "cce"]
"""How logits become log-probs: see `options.Loading.head`."""
Scores = tuple[Tensor, Tensor | None]
"""Log-probs and entropies (or log-probs of the likeliest tokens), the latter None where none were asked for."""


def chosen_logprobs(
    logits_NV: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    entropy: Entropy = "none",
    masked_V: Tensor | None = None,
) -> Scores:
    """Log-probability of each target and entropy of its distribution, both `[N]`, in nats and float32.

    Ids of `masked_V` have the probability 0.

    Example:
        >>> logprobs, entropy = chosen_logprobs(torch.zeros(1, 4), torch.tensor([2]), entropy="measured")
        >>> round(logprobs.item(), 4), round(entropy.item(), 4)
        (-1.3863, 1.3863)
    """
    logits_NV = logits_NV.float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    if masked_V is not None:
        logits_NV = logits_NV.masked_fill(masked_V, -torch.inf)
    normaliser_N = logits_NV.logsumexp(-1)
    logprobs_N = logits_NV.gather(-1, targets_N[:, None]).squeeze(-1) - normaliser_N
    if entropy == "none":
        return logprobs_N, None
    if entropy == "likeliest":
        return logprobs_N, (logits_NV.amax(-1) - normaliser_N).detach()
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "trained"):
        finite_NV = logits_NV if masked_V is None else logits_NV.masked_fill(masked_V, 0.0)
        entropy_N = normaliser_N - (logits_NV.softmax(-1) * finite_NV).sum(-1)
    return logprobs_N, entropy_N


@functools.cache
def compiled_logprobs() -> Callable[..., Scores]:
    """`chosen_logprobs` in few passes over the logits, for any number of tokens."""
    return torch.compile(chosen_logprobs, dynamic=True)


def head_logprobs(
    head: OpenHead,
    hidden_NH: Tensor,
    targets_N: Tensor,
    temperature: float,
    entropy: Entropy,
    *,
    kind: Kind = "plain",
    dtype: torch.dtype | None = None,
    chunk_tokens: int = 1024,
    soft_cap: float | None = None,
    masked_V: Tensor | None = None,
) -> Scores:
    """`chosen_logprobs` of a head's logits, of which one chunk at a time exists, or none.

    Args:
        head: Inside its call, see `OpenHead`.
        hidden_NH: Last hidden states.
        targets_N: The token after each of them.
        temperature: Divides the logits.
        entropy: Whether it is computed, and has a gradient, or what else.
        kind: How. A fused kernel knows no entropy, temperature and mask: in the place of a measured entropy it gives
            `-log p` of the target, whose mean over sampled tokens estimates it; what it cannot do is done in chunks.
        dtype: Of the projection; None is that of the weights, or autocast's.
        chunk_tokens: Tokens projected at a time.
        soft_cap: `c` of `c * tanh(logits / c)`; None for none.
        masked_V: True for ids that cannot be drawn; None for none.
    """
    if kind in FUSED and entropy in ("none", "measured") and temperature == 1.0 and masked_V is None and len(targets_N):
        logprobs_N = fused_logprobs(kind, head, hidden_NH, targets_N, dtype, soft_cap)
        return logprobs_N, None if entropy == "none" else -logprobs_N.detach()
    project = head.project if dtype is None else projection(head, dtype)
    wanted = (kind == "compile" or (kind == "auto" and hidden_NH.is_cuda)) and entropy != "likeliest"  # which is rare

    def chosen(hidden_nH: Tensor, targets_n: Tensor) -> Scores:
        logits_nV = project(hidden_nH)
        if soft_cap is not None:
            logits_nV = soft_cap * torch.tanh(logits_nV / soft_cap)
        compiled = wanted and len(targets_n) > 1  # for 0 and 1 tokens it would be compiled once more
        scores = compiled_logprobs() if compiled else chosen_logprobs
        return scores(logits_nV, targets_n, temperature, entropy, masked_V)

    again = torch.is_grad_enabled() and hidden_NH.requires_grad
    run = functools.partial(checkpoint, chosen, use_reentrant=False) if again else chosen
    chunks = zip(hidden_NH.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    logprobs, entropies = zip(*(run(*chunk) for chunk in chunks), strict=True)
    return torch.cat(logprobs), None if entropy == "none" else torch.cat(entropies)


def projection(head: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A linear head's projection in a type of its own, whatever autocast does; its weight is cast once."""
    weight_VH, bias_V = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)

    def project(hidden_NH: Tensor) -> Tensor:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return nn.functional.linear(hidden_NH.to(dtype), weight_VH, bias_V)

    return project


class OpenHead(nn.Module):
    """A head in whose call other work than its projection can be done, where hooks have gathered its weights.

    It is mixed into the class of a head that exists (as FSDP2 does with the modules that it shards), so that names,
    tied weights, adapters and copies of the model stay what they were. Called with hidden states alone, the head gives
    logits as ever.
    """

    _z3_leaf = True  # DeepSpeed reads it: gather adapters on the head with it, in its hooks and not in their own

    def forward(self, hidden_NH: Tensor, *given: Any, within: Callable[..., Any] | None = None) -> Any:
        """`within(head, hidden_NH, *given)`, or the logits."""
        return self.project(hidden_NH) if within is None else within(self, hidden_NH, *given)

    def project(self, hidden_NH: Tensor) -> Tensor:
        """The logits, without a call of the module and its hooks."""
        return super().forward(hidden_NH)  # type: ignore[no-any-return]


def open_head(head: nn.Module, kind: Kind = "plain", dtype: torch.dtype | None = None) -> None:
    """Make a head an `OpenHead`, in place.

    Raises:
        ValueError: if the head is none that can be computed in this way, or a package is missing.
    """
    if kind in FUSED:
        check_fused(kind, head)
    if dtype is not None and not isinstance(head, nn.Linear):
        raise ValueError(
            f"Expected a linear layer as the vocabulary head with `loading.head_dtype`, got {type(head).__name__}. "
            "Leave the head out of the adapters' `target_modules`, or set `head_dtype: null`."
        )
    if not isinstance(head, OpenHead):
        head.__class__ = _opened(type(head))  # type: ignore[arg-type]


@functools.cache
def _opened(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Open{kind.__name__}", (OpenHead, kind), {})
