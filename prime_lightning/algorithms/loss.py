"""Terms beside the policy's surrogate: KL, the critic's loss, and which tokens are left out of all of them.

Shapes in names: `B` responses, `T` response tokens. `mask_BT` is bool, True = a token we train on. Log-probs are nats
of the sampled tokens and say whose they are: `policy` has gradients, `proximal` is the policy at the start of the
iteration (PPO's old policy), `behaviour` is what the engine sampled with, `reference` is the frozen start.

Losses return `(sum, metrics)`: sums over tokens travel through micro-batches and ranks, and are divided once, by the
global `denominator`. A metric is a detached sum over tokens under the mask, to be divided by the number of tokens;
only a name that ends in `_max` is a maximum, to be reduced by max and not divided.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import LOG_RATIO_LIMIT, masked_sum

Estimator = Literal["k1", "k2", "k3"]
"""Schulman's estimators of a KL divergence from samples."""


def kl(policy_logprobs_BT: Tensor, reference_logprobs_BT: Tensor, estimator: Estimator) -> Tensor:
    """Estimates of KL(policy || reference) from the policy's own tokens, with `d = log policy - log reference`.

    `k1 = d` (unbiased, either sign), `k2 = d^2 / 2` (biased), `k3 = exp(-d) - 1 + d` (unbiased, never negative);
    Schulman, "Approximating KL divergence", 2020. PRIME, arXiv 2502.01456, trains without KL.

    As a penalty inside the reward take `k1`, detached. As a loss take `k2`: on policy its gradient is that of
    KL(policy || reference), whereas that of `k1` is zero on average and that of `k3` is KL(reference || policy)'s.

    Args:
        policy_logprobs_BT: `[B, T]` nats; gradients pass through.
        reference_logprobs_BT: `[B, T]` nats.
        estimator: "k1", "k2" or "k3".

    Returns:
        `[B, T]` nats per token, not masked. For "k3", d is clamped to +-20 before `exp`.

    Raises:
        ValueError: If the estimator is unknown.

    Example:
        >>> policy_BT, reference_BT = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
        >>> kl(policy_BT, reference_BT, "k1"), kl(policy_BT, reference_BT, "k2"), kl(policy_BT, reference_BT, "k3")
        (tensor([[0.5000]]), tensor([[0.1250]]), tensor([[0.1065]]))
    """
    difference_BT = policy_logprobs_BT.float() - reference_logprobs_BT.float()
    if estimator == "k1":
        return difference_BT
    if estimator == "k2":
        return 0.5 * difference_BT.square()
    if estimator != "k3":
        raise ValueError(f"Expected `estimator` k1, k2 or k3, got {estimator!r}.")
    difference_BT = difference_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(-difference_BT) + difference_BT).clamp(
        min=0
    )  # expm1: exp(-d) - 1 cancels; the rest is rounding


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped critic loss: `max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2`, summed over tokens.

    As in PPO, arXiv 1707.06347, and the released code of PRIME, arXiv 2502.01456. Metrics, as the file's header
    defines them: `value/clip_fraction`, `value/mean`, `value/squared_error`.

    Args:
        values_BT: `[B, T]` the critic now, with gradients.
        old_values_BT: `[B, T]` the critic at the start of the iteration.
        returns_BT: `[B, T]` its targets (`gae_returns`).
        mask_BT: `[B, T]` bool.
        clip: How far a value may move in one iteration, in units of the reward.

    Returns:
        `[]` sum of the loss terms, to be divided by the number of tokens, and the metrics.

    Raises:
        ValueError: If `clip` is negative.

    Example:
        >>> values_BT, old_BT, returns_BT = torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]])
        >>> value_loss(values_BT, old_BT, returns_BT, torch.tensor([[True]]))[0]  # (0.2 - 1)^2 / 2
        tensor(0.3200)
    """
    if clip < 0:
        raise ValueError(f"Expected `clip` of at least 0, got {clip}.")
    values_BT, old_values_BT, returns_BT = (
        torch.where(mask_BT, x_BT.float(), 0.0) for x_BT in (values_BT, old_values_BT.detach(), returns_BT.detach())
    )
    near_BT = values_BT.clamp(old_values_BT - clip, old_values_BT + clip)  # exactly v where it does not bind
    free_BT, clipped_BT = (values_BT - returns_BT) ** 2, (near_BT - returns_BT) ** 2
    metrics = {
        "value/clip_fraction": masked_sum(clipped_BT > free_BT, mask_BT),
        "value/mean": masked_sum(values_BT.detach(), mask_BT),
        "value/squared_error": masked_sum(free_BT.detach(), mask_BT),
    }
    return 0.5 * masked_sum(torch.maximum(free_BT, clipped_BT), mask_BT), metrics


def drop_nonfinite(mask_BT: Tensor, *logprobs_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Leave tokens out of which some log-prob is not finite: `mask_t and isfinite(l_t)` for every l.

    An engine may report minus infinity for a token that its filters cut off; such a token would make the whole loss
    of PRIME, arXiv 2502.01456, Eq. 6, NaN.

    Args:
        mask_BT: `[B, T]` bool.
        *logprobs_BT: Any number of `[B, T]` log-probs, nats.

    Returns:
        The `[B, T]` bool mask without them, and the `[]` number of tokens that were dropped.

    Example:
        >>> behaviour_BT = torch.tensor([[-1.0, -torch.inf]])
        >>> drop_nonfinite(torch.tensor([[True, True]]), behaviour_BT)
        (tensor([[ True, False]]), tensor(1))
    """
    finite_BT = mask_BT
    for one_BT in logprobs_BT:
        finite_BT = finite_BT & one_BT.isfinite()
    return finite_BT, mask_BT.sum() - finite_BT.sum()
