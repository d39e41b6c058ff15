"""Losses of the policy and the critic: the clipped surrogate, KL, value loss, importance correction.

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

from prime_lightning.algorithms.masked import masked_mean, masked_sum

Aggregation = Literal["token", "sequence", "constant"]
"""How token losses become one number."""

Estimator = Literal["k1", "k2", "k3"]
"""Schulman's estimators of a KL divergence from samples."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 nats before `exp`: e^20 is 5e8, far beyond any clip bound, and finite."""


def clipped_surrogate(
    policy_logprobs_BT: Tensor,
    proximal_logprobs_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weight_BT: Tensor | None = None,
    aggregate: Aggregation = "token",
    constant_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss: `-min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t)`, `rho_t = policy / proximal`.

    PRIME, arXiv 2502.01456, Eq. 6, which has equal bounds. Metrics, as the file's header defines them:
    `policy/clip_fraction` (tokens without gradient because clipped), `policy/clip_fraction_low` and `_high` (the same
    by bound), `policy/ratio`, `policy/approx_kl` (k3 of KL(proximal || policy), nats).

    Args:
        policy_logprobs_BT: `[B, T]` nats, with gradients.
        proximal_logprobs_BT: `[B, T]` nats.
        advantage_BT: `[B, T]`.
        mask_BT: `[B, T]` bool.
        clip_low: How far below 1 the ratio counts, in [0, 1].
        clip_high: How far above 1 the ratio counts, 0 or more.
        weight_BT: `[B, T]` factor of each token's loss (`importance_weight`), no gradient; None is 1.
        aggregate: See the function `aggregate`; the caller divides by `denominator(mask_BT, aggregate)`.
        constant_length: Tokens, for "constant".

    Returns:
        `[]` sum of the loss terms and the metrics.

    Raises:
        ValueError: If a clip bound is out of range, or as `aggregate` raises.

    Example:
        >>> policy_BT, proximal_BT = torch.tensor([[1.5, 1.0]]).log(), torch.zeros(1, 2)
        >>> loss, metrics = clipped_surrogate(policy_BT, proximal_BT, torch.ones(1, 2), torch.ones(1, 2).bool())
        >>> loss, metrics["policy/clip_fraction"]  # -(1.2 + 1.0)
        (tensor(-2.2000), tensor(1.))
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"Expected `clip_low` in [0, 1] and `clip_high` of at least 0, got {clip_low}, {clip_high}.")
    difference_BT = policy_logprobs_BT.float() - proximal_logprobs_BT.detach().float()
    log_ratio_BT = torch.where(mask_BT, difference_BT, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_BT = log_ratio_BT.exp()
    advantage_BT = torch.where(mask_BT, advantage_BT.detach().float(), 0.0)
    free_BT, clipped_BT = -advantage_BT * ratio_BT, -advantage_BT * ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = torch.maximum(free_BT, clipped_BT)
    if weight_BT is not None:
        loss_BT = torch.where(mask_BT, loss_BT * weight_BT.detach().float(), 0.0)
    binds_BT, ratio_BT, log_ratio_BT = clipped_BT > free_BT, ratio_BT.detach(), log_ratio_BT.detach()
    metrics = {
        "policy/clip_fraction": masked_sum(binds_BT, mask_BT),
        "policy/clip_fraction_low": masked_sum(binds_BT & (ratio_BT < 1), mask_BT),
        "policy/clip_fraction_high": masked_sum(binds_BT & (ratio_BT > 1), mask_BT),
        "policy/ratio": masked_sum(ratio_BT, mask_BT),
        "policy/approx_kl": masked_sum(torch.expm1(log_ratio_BT) - log_ratio_BT, mask_BT),
    }
    return _aggregate(loss_BT, mask_BT, aggregate, constant_length), metrics


def aggregate(loss_BT: Tensor, mask_BT: Tensor, how: Aggregation, constant_length: int | None = None) -> Tensor:
    """Token losses to one sum, to be divided by the global `denominator(mask_BT, how)`.

    The `E_t` of PRIME, arXiv 2502.01456, Eq. 6, leaves it open. `token`: `sum_i sum_t l_it`, every token of the batch
    weighs the same. `sequence`: `sum_i mean_t l_it`, every response weighs the same (the release in effect: it takes
    the token mean of micro-batches of one response per GPU). `constant`: `sum_i sum_t l_it / L`, every token weighs
    the same in every batch.

    Args:
        loss_BT: `[B, T]` token losses.
        mask_BT: `[B, T]` bool.
        how: "token", "sequence" or "constant".
        constant_length: L in tokens, for "constant", such as the longest response allowed.

    Raises:
        ValueError: If `how` is unknown, or "constant" comes without a positive `constant_length`.

    Example:
        >>> loss_BT, mask_BT = torch.tensor([[1.0, 3.0], [5.0, 0.0]]), torch.tensor([[True, True], [True, False]])
        >>> aggregate(loss_BT, mask_BT, "token"), aggregate(loss_BT, mask_BT, "sequence")
        (tensor(9.), tensor(7.))
    """
    if how == "token":
        return masked_sum(loss_BT, mask_BT)
    if how == "sequence":
        return masked_mean(loss_BT, mask_BT, dim=1).sum()
    if how != "constant":
        raise ValueError(f"Expected aggregation token, sequence or constant, got {how!r}.")
    if constant_length is None or constant_length < 1:
        raise ValueError(
            f'Expected a positive `constant_length` with aggregation "constant", got {constant_length};'
            " pass the longest response allowed, in tokens."
        )
    return masked_sum(loss_BT, mask_BT) / constant_length


_aggregate = aggregate  # `clipped_surrogate` has an argument of that name


def denominator(mask_BT: Tensor, how: Aggregation) -> Tensor:
    """What the sum of `aggregate` is divided by, after both are summed over micro-batches and ranks.

    Tokens for "token", responses with at least one token for "sequence" and "constant": the expectation of PRIME,
    arXiv 2502.01456, Eq. 6, over tokens or over responses.

    Args:
        mask_BT: `[B, T]` bool.
        how: "token", "sequence" or "constant".

    Returns:
        `[]` int, the local count; it may be 0.

    Raises:
        ValueError: If `how` is unknown.

    Example:
        >>> mask_BT = torch.tensor([[True, True], [False, False]])
        >>> denominator(mask_BT, "token"), denominator(mask_BT, "sequence")
        (tensor(2), tensor(1))
    """
    if how == "token":
        return mask_BT.sum()
    if how in ("sequence", "constant"):
        return mask_BT.any(dim=1).sum()
    raise ValueError(f"Expected aggregation token, sequence or constant, got {how!r}.")


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


def importance_weight(
    proximal_logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor, mask_BT: Tensor, *, cap: float | None = 2.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Correction for tokens sampled by another policy than PPO's old one: `w_t = min(proximal / behaviour, cap)`.

    Truncated importance sampling: an engine in another precision, or with older weights, does not sample from the
    policy that is trained. Not in PRIME, arXiv 2502.01456. Metrics, as the file's header defines them:
    `importance/weight` (after the cap), `importance/ratio` (before it), `importance/capped` (tokens above the cap),
    `importance/ratio_below_half`, `importance/ratio_above_two`, `importance/abs_diff` and `importance/abs_diff_max`
    (nats), `importance/kl` (k3 of KL(behaviour || proximal), nats).

    Args:
        proximal_logprobs_BT: `[B, T]` nats, of the trainer at the start of the iteration.
        behaviour_logprobs_BT: `[B, T]` nats, of the engine; finite under the mask (`drop_nonfinite`).
        mask_BT: `[B, T]` bool.
        cap: Largest weight, above 0; None for no bound.

    Returns:
        `[B, T]` weights without gradient, 0 outside the mask, and the metrics.

    Raises:
        ValueError: If the cap is not positive.

    Example:
        >>> proximal_BT, behaviour_BT = torch.tensor([[3.0, 0.5]]).log(), torch.zeros(1, 2)
        >>> importance_weight(proximal_BT, behaviour_BT, torch.ones(1, 2).bool())[0]
        tensor([[2.0000, 0.5000]])
    """
    if cap is not None and cap <= 0:
        raise ValueError(f"Expected `cap` above 0, or None for no bound, got {cap}.")
    difference_BT = proximal_logprobs_BT.detach().float() - behaviour_logprobs_BT.detach().float()
    difference_BT = torch.where(mask_BT, difference_BT, 0.0)
    log_ratio_BT = difference_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_BT = torch.where(mask_BT, log_ratio_BT.exp(), 0.0)
    weight_BT = ratio_BT if cap is None else ratio_BT.clamp(max=cap)
    gap_BT = difference_BT.abs()
    return weight_BT, {
        "importance/weight": weight_BT.sum(),
        "importance/ratio": ratio_BT.sum(),
        "importance/capped": (ratio_BT > weight_BT).float().sum(),
        "importance/ratio_below_half": masked_sum(ratio_BT < 0.5, mask_BT),
        "importance/ratio_above_two": masked_sum(ratio_BT > 2, mask_BT),
        "importance/abs_diff": gap_BT.sum(),
        "importance/abs_diff_max": gap_BT.amax() if gap_BT.numel() else gap_BT.sum(),
        "importance/kl": (torch.expm1(log_ratio_BT) - log_ratio_BT).sum(),
    }


def drop_nonfinite(mask_BT: Tensor, *logprobs_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Leave tokens out of which some log-prob is not finite: `mask_t and isfinite(l_t)` for every l.

    An engine may report minus infinity for a token that its filters cut off; such a token would make the whole loss
    of PRIME, arXiv 2502.01456, Eq. 6, NaN.

    Args:
        mask_BT: `[B, T]` bool.
        *logprobs_BT: Any number of `[B, T]` log-probs, nats.

    Returns:
        The `[B, T]` bool mask without them, and the `[]` number of tokens that were dropped.

    Raises:
        RuntimeError: From torch, when the shapes differ.

    Example:
        >>> behaviour_BT = torch.tensor([[-1.0, -torch.inf]])
        >>> drop_nonfinite(torch.tensor([[True, True]]), behaviour_BT)
        (tensor([[ True, False]]), tensor(1))
    """
    finite_BT = mask_BT
    for one_BT in logprobs_BT:
        finite_BT = finite_BT & one_BT.isfinite()
    return finite_BT, mask_BT.sum() - finite_BT.sum()
