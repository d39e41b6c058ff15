"""Log-probs of given tokens by fused kernels of other packages: projection and cross entropy in one, never all logits.

`liger` is liger-kernel's, whose logits exist in small chunks of the inputs' type; `cce` is cut-cross-entropy's (Apple,
arXiv 2411.09009), whose logits stay in registers, in float32. Both are Triton kernels: they run on CUDA only, and give
no entropy. What they promise was read in liger-kernel 0.8.5 and cut-cross-entropy 25.1.1; nobody has run them here.

Shapes: N tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

FUSED = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}
"""The package of each kind."""


def check_fused(kind: str, head: nn.Module) -> None:
    """Refuse a kind whose package is missing, and heads that are more than a matrix.

    Raises:
        ValueError: if so.
    """
    if find_spec(FUSED[kind]) is None:
        raise ValueError(
            f"Expected the package {FUSED[kind]} for `loading.head: {kind}`, got none. "
            'Install it: pip install "prime-lightning[fused]", or take `head: auto`.'
        )
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"Expected a linear vocabulary head without bias and adapters for `loading.head: {kind}`, got {head}. "
            "Take `head: auto`."
        )


def fused_logprobs(
    kind: str, head: Any, hidden_NH: Tensor, targets_N: Tensor, dtype: torch.dtype | None, soft_cap: float | None
) -> Tensor:
    """Log-probability of each target, `[N]`, in nats and float32.

    Args:
        kind: One of `FUSED`.
        head: A linear layer without bias.
        hidden_NH: Last hidden states; at least one.
        targets_N: The token after each of them.
        dtype: Of the projection; None is autocast's, or that of the hidden states.
        soft_cap: `c` of `c * tanh(logits / c)`; None for none.
    """
    device = hidden_NH.device.type
    if dtype is None:  # what autocast would make of a linear layer, which it does not do to kernels
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    with torch.autocast(device, enabled=False):
        loss_N = KERNELS[kind](hidden_NH.to(dtype), head.weight.to(dtype), targets_N, soft_cap)
    return -loss_N.float()


def _liger(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, soft_cap: float | None) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss_N: Tensor = liger_fused_linear_cross_entropy(
        hidden_NH, weight_VH, targets_N, reduction="none", softcap=soft_cap, accum_dtype=torch.float32
    )
    return loss_N


def _cce(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, soft_cap: float | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss_N: Tensor = linear_cross_entropy(
        hidden_NH, weight_VH, targets_N, softcap=soft_cap, reduction="none", filter_eps=None, impl="cce"
    )  # filter_eps would leave small gradients out
    return loss_N


KERNELS = {"liger": _liger, "cce": _cce}
