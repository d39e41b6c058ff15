"""Importance correction for tokens that another policy sampled than the one that is trained.

Shapes in names: `B` responses, `T` response tokens; a row is a whole response. An engine in another precision, or with
older weights, does not sample from the trainer's policy. Not in PRIME, arXiv 2502.01456.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import LOG_RATIO_LIMIT, log_ratio, masked_mean, masked_sum

Unit = Literal["token", "sequence", "sequence_mean"]
"""What has one weight: a token by its own ratio, or a response by the product or the geometric mean of its ratios."""

Beyond = Literal["truncate", "mask"]
"""What becomes of a weight out of bounds: it is brought to the bound, or to 0."""


def importance_weight(
    proximal_logprobs_BT: Tensor,
    behaviour_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    cap: float | None = 2.0,
    floor: float = 0.0,
    per: Unit = "token",
    beyond: Beyond = "truncate",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights `w = clip(rho, floor, cap)`, or `w = rho [floor <= rho <= cap]`, of `rho = proximal / behaviour`.

    `beyond="truncate"` is truncated importance sampling (TIS; Ionides, 2008), `"mask"` leaves out what the two policies
    disagree about: by tokens it is IcePop (Ring-1T, arXiv 2510.18855; 0.5 to 5). Per sequence `rho_i = prod_t rho_it`,
    unbiased but for its bounds, of a variance that grows with the length; masked, that is MIS (Liu et al., "When speed
    kills stability", 2025). `"sequence_mean"` is its geometric form, `exp(mean_t log rho_it)`.

    Metrics are sums over tokens, to be divided by their number; only a name that ends in `_max` is a maximum:
    `importance/weight` (within the bounds), `importance/capped` (tokens whose weight the bounds changed),
    and of the ratios of single tokens, whatever `per` is: `importance/ratio`, `importance/ratio_below_half`,
    `importance/ratio_above_two`, `importance/abs_diff` and `importance/abs_diff_max` (nats), `importance/kl` (k3 of
    KL(behaviour || proximal), nats).

    Args:
        proximal_logprobs_BT: `[B, T]` nats, of the trainer at the start of the iteration.
        behaviour_logprobs_BT: `[B, T]` nats, of the engine; finite under the mask (`drop_nonfinite`).
        mask_BT: `[B, T]` bool.
        cap: Largest weight, above 0; None for no bound.
        floor: Smallest weight, 0 or more and below the cap.
        per: "token", "sequence" or "sequence_mean".
        beyond: "truncate" or "mask".

    Returns:
        `[B, T]` weights without gradient, 0 outside the mask, and the metrics.

    Raises:
        ValueError: If the cap is not positive, the floor is not below it, or a word is unknown.

    Example:
        >>> proximal_BT, behaviour_BT = torch.tensor([[3.0, 0.5]]).log(), torch.zeros(1, 2)
        >>> importance_weight(proximal_BT, behaviour_BT, torch.ones(1, 2).bool())[0]
        tensor([[2.0000, 0.5000]])
        >>> importance_weight(proximal_BT, behaviour_BT, torch.ones(1, 2).bool(), beyond="mask")[0]
        tensor([[0.0000, 0.5000]])
        >>> importance_weight(proximal_BT, behaviour_BT, torch.ones(1, 2).bool(), per="sequence")[0]
        tensor([[1.5000, 1.5000]])
    """
    _check(cap, floor, per, beyond)
    proximal_BT, behaviour_BT = proximal_logprobs_BT.detach(), behaviour_logprobs_BT.detach()
    log_ratio_BT = log_ratio(proximal_BT, behaviour_BT, mask_BT)
    ratio_BT = torch.where(mask_BT, log_ratio_BT.exp(), 0.0)
    free_BT = torch.where(mask_BT, _of_unit(log_ratio_BT, mask_BT, per).exp(), 0.0)
    weight_BT = torch.where(mask_BT, free_BT.clamp(min=floor, max=cap), 0.0)
    changed_BT = mask_BT & (weight_BT != free_BT)
    if beyond == "mask":
        weight_BT = weight_BT.masked_fill(changed_BT, 0.0)
    gap_BT = torch.where(mask_BT, proximal_BT.float() - behaviour_BT.float(), 0.0).abs()
    metrics = {
        "importance/weight": weight_BT.sum(),
        "importance/ratio": ratio_BT.sum(),
        "importance/capped": changed_BT.float().sum(),
        "importance/ratio_below_half": masked_sum(ratio_BT < 0.5, mask_BT),
        "importance/ratio_above_two": masked_sum(ratio_BT > 2, mask_BT),
        "importance/abs_diff": gap_BT.sum(),
        "importance/abs_diff_max": gap_BT.amax() if gap_BT.numel() else gap_BT.sum(),
        "importance/kl": (torch.expm1(log_ratio_BT) - log_ratio_BT).sum(),
    }
    return weight_BT, metrics


def _of_unit(log_ratio_BT: Tensor, mask_BT: Tensor, per: Unit) -> Tensor:
    """`[B, T]` log of the ratio that gives each token its weight."""
    if per == "token":
        return log_ratio_BT
    of_row = masked_mean if per == "sequence_mean" else masked_sum
    log_ratio_B1 = of_row(log_ratio_BT, mask_BT, dim=1)[:, None]
    return log_ratio_B1.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).expand_as(log_ratio_BT)


def _check(cap: float | None, floor: float, per: str, beyond: str) -> None:
    """Refuse bounds that leave no weight, and words that mean nothing."""
    if cap is not None and cap <= 0:
        raise ValueError(f"Expected `cap` above 0, or None for no bound, got {cap}.")
    if not 0 <= floor < (cap or float("inf")):
        raise ValueError(f"Expected `floor` of 0 or more and below the cap {cap}, got {floor}.")
    if per not in ("token", "sequence", "sequence_mean") or beyond not in ("truncate", "mask"):
        raise ValueError(
            "Expected `per` token, sequence or sequence_mean and `beyond` truncate or mask, got "
            f"{per!r} and {beyond!r}."
        )
