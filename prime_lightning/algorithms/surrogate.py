"""Surrogates of the policy's loss, all of one signature: PPO's clipped ratio, GSPO's of sequences, CISPO's weights.

Shapes in names: `B` responses, `T` response tokens; a row is a whole response. What each takes:

- `policy_logprobs_BT`: nats, with gradients. `proximal_logprobs_BT`: nats, the policy at the start of the iteration.
- `advantage_BT`: of each token, so that process rewards count in all of them. `mask_BT`: bool, True = trained on.
- `clip_low`, `clip_high`: how far below and above 1 the ratio counts; in [0, 1], and 0 or more.
- `weight_BT`: factor of each token's loss (`importance_weight`), without gradient; None is 1.
- `aggregate`, `constant_length`: as the function `aggregate` has them; the caller divides by `denominator`.

Each returns `(sum, metrics)`: a sum of loss terms, which travels through micro-batches and ranks and is divided once,
and detached sums over tokens under the mask, to be divided by their number: `policy/clip_fraction` (tokens that the
clip acts on), `policy/clip_fraction_low` and `_high` (the same by bound), `policy/ratio` (what is clipped) and
`policy/approx_kl` (k3 of KL(proximal || policy) by tokens, nats).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import Aggregation, log_ratio, masked_mean, masked_sum
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
