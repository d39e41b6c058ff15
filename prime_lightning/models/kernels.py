"""Faster layers for the same numbers: Liger's Triton kernels, or `torch.compile` of each decoder layer.

Nobody has run either on a GPU with this package yet; the compiled layers were compared with the plain ones on a CPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from transformers import AttentionInterface, PreTrainedModel

from prime_lightning.models.attention import VARLEN, varlen

Kernels = Literal["none", "liger", "compile"]


def apply_kernels(model: PreTrainedModel, kernels: Kernels, *, gathers_weights: bool = False) -> None:
    """Change a model in place.

    Args:
        model: A causal LM.
        kernels: `liger` for its norms and MLPs, `compile` for its layers, `none` for nothing.
        gathers_weights: Whether each matrix is gathered by a hook of its own, as under ZeRO-3.

    Raises:
        ValueError: for kernels that cannot work here.
    """
    check_kernels(kernels, gathers_weights=gathers_weights)
    if kernels == "liger":
        _liger(model)
    elif kernels == "compile":
        AttentionInterface.register(VARLEN, torch.compiler.disable(varlen))  # lengths would compile it again and again
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)


def check_kernels(kernels: Kernels, *, gathers_weights: bool) -> None:
    """Refuse to compile what ZeRO-3's hooks interrupt.

    Raises:
        ValueError: if so.
    """
    if kernels == "compile" and gathers_weights:
        raise ValueError("Expected another strategy than ZeRO-3 with `loading.kernels: compile`; take fsdp2.yaml.")


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The layers that transformers names as those which stay whole."""
    names = set(model._no_split_modules or [])
    return [module for module in model.modules() if type(module).__name__ in names]


def _liger(model: PreTrainedModel) -> None:
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(
            "Expected a CUDA device and the package liger-kernel with `loading.kernels: liger`, got no "
            f'{"package" if torch.cuda.is_available() else "CUDA device"}: pip install "prime-lightning[fused]".'
        )
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.get_text_config().model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"Expected a model that Liger has kernels for, got {kind!r}; take `loading.kernels: compile`.")
    _apply_liger_kernel_to_instance(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
