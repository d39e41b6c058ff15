"""What users set about how models are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from prime_lightning.models.head import Kind

PRECISIONS = {"32-true": "32-true", "32": "32-true", "bf16-mixed": "bf16-mixed", "bf16": "bf16-mixed"}
"""Lightning's names of the precisions that runs may have, and its short ones."""


def precision_of(name: str | int | None) -> str:
    """The full name of a precision.

    Log-probs, advantages and labels are never cast: Lightning's others do that, or scale gradients, which clipping and
    sums over micro-batches would have to know.

    Raises:
        ValueError: for a precision that runs may not have.

    Example:
        >>> precision_of(32), precision_of("bf16")
        ('32-true', 'bf16-mixed')
    """
    if name is not None and str(name) not in PRECISIONS:
        raise ValueError(
            f"Expected `trainer.precision` 32-true or bf16-mixed, got {name!r}. For weights in bfloat16 take "
            "32-true with `model.loading.dtype: bfloat16`."
        )
    return PRECISIONS[str(name)] if name is not None else "32-true"


def cpu_precision(capabilities: Mapping[str, Any] | None = None) -> str:
    """`bf16-mixed` on a CPU with instructions for bfloat16, else `32-true`: `${cpu_precision:}` in configurations.

    Without such instructions torch computes bfloat16 in float32, slower than float32 itself.

    Args:
        capabilities: As `torch.cpu.get_capabilities()` says, which is asked by default.

    Example:
        >>> cpu_precision({"avx512_bf16": True}), cpu_precision({"avx2": True})
        ('bf16-mixed', '32-true')
    """
    if capabilities is None:  # older releases of torch do not say
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded and run."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights. float32 masters with `trainer.precision: bf16-mixed` are PRIME's choice; with
    bfloat16 weights, steps as small as PRIME's are mostly rounded away."""
    attention: str = "sdpa"
    """`varlen` for packed rows (torch's own flash attention on CUDA, no package needed), or a kind of transformers:
    `sdpa`, `eager`, `flash_attention_2` (package flash-attn), a kernel of the hub (package kernels)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    packed: bool = False
    """Put responses one behind another without padding; for `varlen` and flash attention."""
    shared_prompts: Literal["auto", "on", "off"] = "auto"
    """Run a prompt once for all of its responses in a micro-batch: the same numbers from fewer tokens. `auto` does so
    with `attention: varlen`, the only kind that can."""
    kernels: Literal["none", "liger", "compile"] = "none"
    """Faster layers: `liger` (package liger-kernel, CUDA), or `compile` (torch.compile of each, not under ZeRO-3)."""
    chunk_tokens: int = 1024
    """Response tokens projected onto the vocabulary at a time."""
    head: Kind = "auto"
    """How logits become log-probs: `plain`, `compile` (the same by torch.compile), `auto` (`compile` on CUDA, `plain`
    elsewhere), or a fused kernel that never has all logits: `liger`, `cce` (extra `fused`, CUDA only). These estimate
    `policy/entropy` by `-log p` of the sampled tokens; an entropy bonus, `sampling.mask_padding` or a temperature other
    than 1 is computed as by `plain`."""
    head_dtype: Literal["float32"] | None = None
    """Type of the projection onto the vocabulary; null takes that of the weights, or `bf16-mixed`'s."""

    def __post_init__(self) -> None:
        if self.attention == "varlen" and not self.packed:
            raise ValueError("Expected `loading.packed: true` with `loading.attention: varlen`, got false.")
        if self.shared_prompts == "on" and self.attention != "varlen":
            raise ValueError(
                f"Expected `loading.attention: varlen` with `loading.shared_prompts: on`, got {self.attention!r}."
            )

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is run once for all of its responses."""
        return self.attention == "varlen" and self.shared_prompts != "off"

    @property
    def scoring(self) -> dict[str, Any]:
        """The options of `ScoringLM` and `ValueLM`."""
        return {
            "chunk_tokens": self.chunk_tokens,
            "packed": self.packed,
            "shared_prompts": self.shares_prompts,
            "head": self.head,
            "head_dtype": self.head_dtype,
        }


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters instead of all weights (LoRA, arXiv 2106.09685): `W + (alpha / rank) B A`."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """Scale of the adapters, divided by the rank."""
    rslora: bool = False
    """Divide by the root of the rank instead (arXiv 2312.03732)."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get adapters, a pattern, or `all-linear`: every linear layer but the head."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"Expected a LoRA `rank` of at least 1, got {self.rank}.")
