"""Losses of policy and critic: surrogates, KL, importance weights, and which tokens are left out of all of them.

Shapes in names: `B` responses, `T` response tokens; a row is a whole response. `mask_BT` is bool, True = a token we
train on. Log-probs are nats of the sampled tokens and say whose they are: `policy` has gradients, `proximal` is the
policy at the start of the iteration (PPO's old policy), `behaviour` is what the engine sampled with, `reference` is the
frozen start.

Losses return `(sum, metrics)`: sums over tokens travel through micro-batches and ranks, and are divided once, by the
global `denominator`. A metric is a detached sum over tokens under the mask, to be divided by the number of tokens;
only a name that ends in `_max` is a maximum, to be reduced by max and not divided.

Surrogates are of one signature: PPO's clipped ratio, GSPO's of sequences, CISPO's weights. What each takes:

- `policy_logprobs_BT`, `proximal_logprobs_BT`, `mask_BT`.
- `advantage_BT`: of each token, so that process rewards count in all of them.
- `clip_low`, `clip_high`: how far below and above 1 the ratio counts; in [0, 1], and 0 or more.
- `weight_BT`: factor of each token's loss (`importance_weight`), without gradient; None is 1.
- `aggregate`, `constant_length`: as the function `aggregate` has them; the caller divides by `denominator`.

Their metrics: `policy/clip_fraction` (tokens that the clip acts on), `policy/clip_fraction_low` and `_high` (the same
by bound), `policy/ratio` (what is clipped) and `policy/approx_kl` (k3 of KL(proximal || policy) by tokens, nats).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import LOG_RATIO_LIMIT, Aggregation, log_ratio, masked_mean, masked_sum
from prime_lightning.algorithms.masked import aggregate as _aggregate  # the surrogates have an argument of that name

Surrogate = tuple[Tensor, dict[str, Tensor]]
"""Sum of the loss terms, and metrics."""


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
) -> Surrogate:
    """PPO's clipped loss: `-min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t)`, `rho_t = policy / proximal`.

    PRIME, arXiv 2502.01456, Eq. 6, which has equal bounds. With `clip_high` above `clip_low` this is the clip-higher of
    DAPO, arXiv 2503.14476, Eq. 10, and with `aggregate="token"` its token mean, Eq. 12. A token without gradient
    because it is clipped counts in `policy/clip_fraction`.

    Raises:
        ValueError: If a clip bound is out of range, or as `aggregate` raises.

    Example:
        >>> policy_BT, proximal_BT = torch.tensor([[1.5, 1.0]]).log(), torch.zeros(1, 2)
        >>> loss, metrics = clipped_surrogate(policy_BT, proximal_BT, torch.ones(1, 2), torch.ones(1, 2).bool())
        >>> loss, metrics["policy/clip_fraction"]  # -(1.2 + 1.0)
        (tensor(-2.2000), tensor(1.))
    """
    log_ratio_BT = log_ratio(policy_logprobs_BT, proximal_logprobs_BT.detach(), mask_BT)
    ratio_BT = log_ratio_BT.exp()
    loss_BT, binds_BT = _pessimistic(ratio_BT, advantage_BT, mask_BT, clip_low, clip_high)
    total = _aggregate(_weighed(loss_BT, weight_BT, mask_BT), mask_BT, aggregate, constant_length)
    return total, _metrics(binds_BT, ratio_BT, log_ratio_BT, mask_BT)


def gspo(
    policy_logprobs_BT: Tensor,
    proximal_logprobs_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weight_BT: Tensor | None = None,
    aggregate: Aggregation = "sequence",
    constant_length: int | None = None,
) -> Surrogate:
    """The clipped loss with the ratio of sequences: `s_i = exp(mean_t log(policy_t / proximal_t))` for each token.

    GSPO, arXiv 2507.18071, Eq. 5 with the ratio of Eq. 7, in the token form of Eq. 13 and 14,
    `s_it = sg[s_i] policy_t / sg[policy_t]`: of value s_i, and with the gradient of each token's own log-prob. Where
    all tokens of a response have one advantage and `aggregate` is "sequence", that is Eq. 5 in value, clip and
    gradient; process rewards give each token its own. The mean is over the tokens under the mask.

    Raises:
        ValueError: If a clip bound is out of range, or as `aggregate` raises.

    Example:
        >>> policy_BT, proximal_BT = torch.tensor([[4.0, 1.0]]).log(), torch.zeros(1, 2)
        >>> gspo(policy_BT, proximal_BT, torch.ones(1, 2), torch.ones(1, 2).bool(), clip_high=2.0)[0]  # sqrt(4 x 1)
        tensor(-2.)
    """
    log_ratio_BT = log_ratio(policy_logprobs_BT, proximal_logprobs_BT.detach(), mask_BT)
    mean_B1 = masked_mean(log_ratio_BT.detach(), mask_BT, dim=1)[:, None]
    nothing_BT = log_ratio(policy_logprobs_BT, policy_logprobs_BT.detach(), mask_BT)  # 0, with the policy's gradient
    ratio_BT = (mean_B1 + nothing_BT).exp()
    loss_BT, binds_BT = _pessimistic(ratio_BT, advantage_BT, mask_BT, clip_low, clip_high)
    total = _aggregate(_weighed(loss_BT, weight_BT, mask_BT), mask_BT, aggregate, constant_length)
    return total, _metrics(binds_BT, ratio_BT, log_ratio_BT, mask_BT)


def cispo(
    policy_logprobs_BT: Tensor,
    proximal_logprobs_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    weight_BT: Tensor | None = None,
    aggregate: Aggregation = "token",
    constant_length: int | None = None,
) -> Surrogate:
    """REINFORCE under a clipped weight: `-sg[clip(rho_t, 1 - low, 1 + high)] A_t log policy_t`.

    CISPO of MiniMax-M1, arXiv 2506.13585, Eq. 4 with the weight of Eq. 5. The clip bounds the weight and takes no
    token's gradient away, as PPO's does. `clip_low=1` is no lower bound, which is what the paper trains with; of its
    upper bound it says only that it was tuned. A token whose weight is clipped counts in `policy/clip_fraction`.

    Raises:
        ValueError: If a clip bound is out of range, or as `aggregate` raises.

    Example:
        >>> policy_BT = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
        >>> loss, _ = cispo(policy_BT, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool())
        >>> torch.autograd.grad(loss, policy_BT)[0]  # PPO would give the first token 0
        tensor([[-2., -1.]])
    """
    _check_bounds(clip_low, clip_high)
    log_ratio_BT = log_ratio(policy_logprobs_BT.detach(), proximal_logprobs_BT.detach(), mask_BT)
    ratio_BT = log_ratio_BT.exp()
    capped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    advantage_BT, own_BT = (
        torch.where(mask_BT, x_BT.float(), 0.0) for x_BT in (advantage_BT.detach(), policy_logprobs_BT)
    )
    loss_BT = -capped_BT * advantage_BT * own_BT
    total = _aggregate(_weighed(loss_BT, weight_BT, mask_BT), mask_BT, aggregate, constant_length)
    return total, _metrics(capped_BT != ratio_BT, ratio_BT, log_ratio_BT, mask_BT)


def _pessimistic(
    ratio_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """`[B, T]` PPO's loss of each token, and where it is the clipped term that counts."""
    _check_bounds(low, high)
    advantage_BT = torch.where(mask_BT, advantage_BT.detach().float(), 0.0)
    free_BT, clipped_BT = -advantage_BT * ratio_BT, -advantage_BT * ratio_BT.clamp(1 - low, 1 + high)
    return torch.maximum(free_BT, clipped_BT), clipped_BT > free_BT


def _check_bounds(low: float, high: float) -> None:
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"Expected `clip_low` in [0, 1] and `clip_high` of at least 0, got {low}, {high}.")


def _weighed(loss_BT: Tensor, weight_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
    """The losses of tokens times their weights."""
    return loss_BT if weight_BT is None else torch.where(mask_BT, loss_BT * weight_BT.detach().float(), 0.0)


def _metrics(binds_BT: Tensor, ratio_BT: Tensor, log_ratio_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Sums over tokens: where the clip acts, of the ratio that it acts on, and of the distance by tokens."""
    ratio_BT, log_ratio_BT = ratio_BT.detach(), log_ratio_BT.detach()
    return {
        "policy/clip_fraction": masked_sum(binds_BT, mask_BT),
        "policy/clip_fraction_low": masked_sum(binds_BT & (ratio_BT < 1), mask_BT),
        "policy/clip_fraction_high": masked_sum(binds_BT & (ratio_BT > 1), mask_BT),
        "policy/ratio": masked_sum(ratio_BT, mask_BT),
        "policy/approx_kl": masked_sum(torch.expm1(log_ratio_BT) - log_ratio_BT, mask_BT),
    }


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
    k3_BT = torch.expm1(-difference_BT) + difference_BT  # expm1: exp(-d) - 1 cancels
    return k3_BT.clamp(min=0)  # what is below is rounding


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
