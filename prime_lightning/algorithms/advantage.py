"""Advantage estimators, all of one signature: outcome credit and process credit, per token, apart.

Shapes in names: `B` responses, `T` response tokens. What each takes:

- `outcome_B`: outcome rewards in [0, 1], less what a shaping takes; NaN allowed where invalid.
- `process_BT`: process rewards, or None.
- `mask_BT`: bool, True = a token we train on. `group_B`: any int per prompt. `valid_B`: False = no known verdict.
- `options`: `gamma_outcome` and `gamma_process`, discounts of the two rewards in [0, 1], by default 1; and for `gae`
  alone `values_BT`, a critic's estimate before each token, and `lam`.

Each returns `(outcome_BT, process_BT)`, both `[B, T]` float32. `mixed` weighs them, so that every weight counts
for every estimator, those that normalise too. What holds for all:

- The parts know nothing of each other. Without process reward the second is 0 everywhere.
- The outcome reward sits on the response's last trained token: `A_outcome_t = gamma_outcome^(tokens after t) * A_i`.
- An invalid response takes part in no baseline and gets 0, as does everything outside the mask.
- A group with fewer than two *valid* members gives a group estimator nothing to compare: advantage 0. A valid
  response that has no fellow at all is a mistake of the configuration: ValueError.
- No gradient flows through. Nothing is whitened: that is `masked.whiten`, the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import group_mean, group_sum, masked_mean, masked_sum, reverse_cumsum

STD_EPSILON = 1e-6
"""Added to the standard deviation by `grpo`, as in the released code."""

Credit = tuple[Tensor, Tensor]
"""Credit of the outcome and of the process reward, each `[B, T]`."""

_Baseline = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(x_B, group_B, valid_B) -> (baseline_B, scale_B)`: the credit of a reward r of response i is `(r - b_i) * s_i`."""


def rloo(
    outcome_B: Tensor, process_BT: Tensor | None, mask_BT: Tensor, group_B: Tensor, valid_B: Tensor, **options: Any
) -> Credit:
    """Leave-one-out: `A_t = sum_{s>=t} gamma^(s-t) [r_s - 1/(K-1) sum_{j!=i} m_j] + o_i - 1/(K-1) sum_{j!=i} o_j`.

    PRIME, arXiv 2502.01456, Eq. 4 (outcome) and Eq. 5 (process), with `m_j` the per-token mean of the process reward
    of response j and K the valid members. The mean is what the paper's three-step text and its code have; the formula
    of Eq. 5 has the sum, which is `rloo_printed`.

    Raises:
        ValueError: If a valid response is alone in its group.

    Example:
        >>> mask_BT, group_B, valid_B = torch.ones(3, 2).bool(), torch.zeros(3).long(), torch.ones(3).bool()
        >>> outcome_BT, _ = rloo(torch.tensor([1.0, 0.0, 0.0]), None, mask_BT, group_B, valid_B)
        >>> outcome_BT[:, 0]
        tensor([ 1.0000, -0.5000, -0.5000])
    """
    return _credit(_leave_one_out, outcome_B, process_BT, mask_BT, group_B, valid_B, **options)


def rloo_printed(
    outcome_B: Tensor, process_BT: Tensor | None, mask_BT: Tensor, group_B: Tensor, valid_B: Tensor, **options: Any
) -> Credit:
    """As `rloo`, with Eq. 5 to the letter: `m_j` is the sum of the process reward of response j.

    PRIME, arXiv 2502.01456, Eq. 5. Each token then loses the reward of whole other responses, so that a
    constant per token, which CE leaves undetermined, does not cancel. For comparison only.

    Raises:
        ValueError: If a valid response is alone in its group.

    Example:
        >>> mask_BT, group_B, valid_B = torch.ones(2, 2).bool(), torch.zeros(2).long(), torch.ones(2).bool()
        >>> rloo_printed(torch.zeros(2), torch.tensor([[3.0, 1.0], [0.0, 0.0]]), mask_BT, group_B, valid_B)[1]
        tensor([[ 4.,  1.],
                [-8., -4.]])
    """
    rows = mask_BT, group_B, valid_B
    return _credit(_leave_one_out, outcome_B, process_BT, *rows, of_response=masked_sum, **options)


def rloo_official(
    outcome_B: Tensor, process_BT: Tensor | None, mask_BT: Tensor, group_B: Tensor, valid_B: Tensor, **options: Any
) -> Credit:
    """As released: `A_t = sum_{s>=t} gamma^(s-t) [r_s K/(K-1) - 1/(K-1) sum_j m_j] + (the same of o)`.

    The code of PRIME, arXiv 2502.01456 (`compute_rloo_returns`). For the outcome, one number per response, that is
    leave-one-out exactly. For the process reward it is leave-one-out plus `(r_s - m_i)/(K-1)`: deviations inside a
    response grow by `K/(K-1)`. The release then whitens over the batch; that is `masked.whiten`, after this.

    Raises:
        ValueError: If a valid response is alone in its group.

    Example:
        >>> mask_BT, group_B, valid_B = torch.ones(2, 2).bool(), torch.zeros(2).long(), torch.ones(2).bool()
        >>> rloo_official(torch.zeros(2), torch.tensor([[3.0, 1.0], [0.0, 0.0]]), mask_BT, group_B, valid_B)[1]
        tensor([[ 4.,  0.],
                [-4., -2.]])
    """
    return _credit(_released, outcome_B, process_BT, mask_BT, group_B, valid_B, **options)


def grpo(
    outcome_B: Tensor, process_BT: Tensor | None, mask_BT: Tensor, group_B: Tensor, valid_B: Tensor, **options: Any
) -> Credit:
    """Group-normalised: `A_t = (o_i - mean_j o_j) / std_j o_j + sum_{s>=t} gamma^(s-t) (r_s - mean_j m_j) / std_j m_j`.

    PRIME, arXiv 2502.01456, Eq. 7, with `m_j` the per-token mean of the process reward of response j. `std` is the
    unbiased one (`torch.std`, as in verl's GRPO) plus 1e-6. Each part is divided by its own spread, so the unit of the
    process reward does not matter; its weight, which `mixed` applies afterwards, does. Mind the second term: it
    divides token rewards by the spread of response *means*, which is far smaller, and near zero for a PRM that knows
    nothing (`ProcessGate`).

    Raises:
        ValueError: If a valid response is alone in its group.

    Example:
        >>> mask_BT, group_B, valid_B = torch.ones(2, 1).bool(), torch.zeros(2).long(), torch.ones(2).bool()
        >>> outcome_BT, _ = grpo(torch.tensor([1.0, 0.0]), None, mask_BT, group_B, valid_B)
        >>> outcome_BT[:, 0].round(decimals=3)
        tensor([ 0.7070, -0.7070])
    """
    return _credit(_standardised, outcome_B, process_BT, mask_BT, group_B, valid_B, **options)


def dr_grpo(
    outcome_B: Tensor, process_BT: Tensor | None, mask_BT: Tensor, group_B: Tensor, valid_B: Tensor, **options: Any
) -> Credit:
    """`grpo` without the standard deviation: `A_t = o_i - mean_j o_j + sum_{s>=t} gamma^(s-t) (r_s - mean_j m_j)`.

    Dr. GRPO, arXiv 2503.20783, section 3.2, with the process reward as in PRIME, arXiv 2502.01456, Eq. 7. Its other
    half is in the loss: `policy_loss: {aggregate: constant}` in place of a mean over each response. The mean counts
    the response itself, so that the outcome's part is `(K - 1) / K` of that of `rloo`, with K the valid members.

    Raises:
        ValueError: If a valid response is alone in its group.

    Example:
        >>> mask_BT, group_B, valid_B = torch.ones(4, 1).bool(), torch.zeros(4).long(), torch.ones(4).bool()
        >>> dr_grpo(torch.tensor([1.0, 0.0, 0.0, 0.0]), None, mask_BT, group_B, valid_B)[0].flatten()
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    return _credit(_centred, outcome_B, process_BT, mask_BT, group_B, valid_B, **options)


def reinforce(
    outcome_B: Tensor, process_BT: Tensor | None, mask_BT: Tensor, group_B: Tensor, valid_B: Tensor, **options: Any
) -> Credit:
    """No baseline: `A_t = o_i + sum_{s>=t} gamma^(s-t) r_s`.

    PRIME, arXiv 2502.01456, Eq. 8. A group of one is fine here.

    Example:
        >>> mask_BT, group_B, valid_B = torch.ones(1, 3).bool(), torch.zeros(1).long(), torch.ones(1).bool()
        >>> reinforce(torch.tensor([1.0]), torch.tensor([[0.0, 2.0, 3.0]]), mask_BT, group_B, valid_B)
        (tensor([[1., 1., 1.]]), tensor([[5., 5., 3.]]))
    """
    return _credit(_no_baseline, outcome_B, process_BT, mask_BT, group_B, valid_B, **options)


def gae(
    outcome_B: Tensor,
    process_BT: Tensor | None,
    mask_BT: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    *,
    values_BT: Tensor | None = None,
    gamma_outcome: float = 1.0,
    gamma_process: float = 1.0,
    lam: float = 1.0,
) -> Credit:
    """PPO: `A_t = sum_{s>=t} (gamma_o lam)^(s-t) [o_s + gamma_o v_{s+1} - v_s] + sum_{s>=t} (gamma_p lam)^(s-t) r_s`.

    GAE, arXiv 1506.02438, with the process reward added (PRIME, arXiv 2502.01456, section 5.3); `o_s` is the outcome
    reward on the last token and 0 before, v after the last token is 0. GAE is linear in the rewards, so with equal
    discounts the sum is exactly GAE of the summed reward; with two, each reward keeps its own and bootstrapping takes
    `gamma_outcome`. The first part is that with o and v, the second that with r. The critic estimates the weighted sum
    of both returns; what is given here is its estimate in the unit of `outcome_B`, that is divided by the weight of the
    outcome. Its targets are `gae_returns`.

    Raises:
        ValueError: If `values_BT` is None.

    Example:
        >>> mask_BT, group_B, valid_B = torch.ones(1, 2).bool(), torch.zeros(1).long(), torch.ones(1).bool()
        >>> gae(torch.ones(1), None, mask_BT, group_B, valid_B, values_BT=torch.tensor([[0.5, 0.75]]))[0]
        tensor([[0.5000, 0.2500]])
    """
    if values_BT is None:
        raise ValueError("Expected `values_BT` for gae, got None; switch the critic on or choose rloo, which has none.")
    mask_BT = mask_BT & valid_B[:, None]
    values_BT = torch.where(mask_BT, values_BT.detach().float(), 0.0)
    outcome_B = torch.where(valid_B, outcome_B.detach().float(), 0.0)
    delta_BT = _on_last(outcome_B, mask_BT) + gamma_outcome * _next(values_BT, mask_BT) - values_BT
    outcome_BT = reverse_cumsum(delta_BT, mask_BT, gamma_outcome * lam)
    if process_BT is None:
        return outcome_BT, torch.zeros_like(outcome_BT)
    return outcome_BT, reverse_cumsum(process_BT.detach().float(), mask_BT, gamma_process * lam)


def gae_returns(advantage_BT: Tensor, values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """What the critic is trained towards: `R_t = A_t + v_t`, with A from `gae` before any whitening.

    The TD(lambda) return, arXiv 1506.02438; with lam 1 the discounted sum of rewards.

    Args:
        advantage_BT: `[B, T]` from `gae`, mixed.
        values_BT: `[B, T]` the critic's estimates, in the unit of the advantage.
        mask_BT: `[B, T]` bool; pass `mask_BT & valid_B[:, None]`, an unknown outcome teaches nothing.

    Example:
        >>> advantage_BT, values_BT = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.5, 0.75]])
        >>> gae_returns(advantage_BT, values_BT, torch.tensor([[True, True]]))
        tensor([[1., 1.]])
    """
    return torch.where(mask_BT, advantage_BT.detach().float() + values_BT.detach().float(), 0.0)


def mixed(
    credit: tuple[Tensor, Tensor], *, outcome_weight: float = 1.0, process_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Both parts in the unit of the policy's advantage, `(w_o A_o, w_p A_p)`; their sum is the advantage.

    PRIME, arXiv 2502.01456, Eq. 5, whose two terms have no weights. A part of weight 0 is 0, whatever it was: rewards
    of a broken PRM that are not finite stay out, too.

    Args:
        credit: From an estimator.
        outcome_weight: Weight of the outcome's part.
        process_weight: Weight of the process reward's part.

    Raises:
        ValueError: If `credit` is not two tensors, such as the one sum of both.

    Example:
        >>> mixed((torch.ones(1, 2), torch.full((1, 2), torch.nan)), process_weight=0.0)
        (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """
    if isinstance(credit, Tensor) or len(credit) != 2:
        raise ValueError(
            "Expected an advantage estimator to return two tensors, the credit of the outcome and that of the process "
            f"reward, each unweighted and `[B, T]`; got {type(credit).__name__}. See `prime_lightning.algorithms.rloo`."
        )
    outcome_BT, process_BT = credit
    return (
        outcome_weight * outcome_BT if outcome_weight else torch.zeros_like(outcome_BT),
        process_weight * process_BT if process_weight else torch.zeros_like(process_BT),
    )


def _credit(
    baseline: _Baseline,
    outcome_B: Tensor,
    process_BT: Tensor | None,
    mask_BT: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    *,
    of_response: Callable[..., Tensor] = masked_mean,
    gamma_outcome: float = 1.0,
    gamma_process: float = 1.0,
    values_BT: Tensor | None = None,
    lam: float = 1.0,
) -> Credit:
    """`[B, T]` outcome and process credit: `(r - baseline) * scale`, summed backwards with a discount."""
    mask_BT = mask_BT & valid_B[:, None]
    outcome_B = torch.where(valid_B, outcome_B.detach().float(), 0.0)
    baseline_B, scale_B = baseline(outcome_B, group_B, valid_B)
    outcome_BT = reverse_cumsum(_on_last((outcome_B - baseline_B) * scale_B, mask_BT), mask_BT, gamma_outcome)
    if process_BT is None:
        return outcome_BT, torch.zeros_like(outcome_BT)
    process_BT = process_BT.detach().float()
    baseline_B, scale_B = baseline(of_response(process_BT, mask_BT, dim=1), group_B, valid_B)
    centred_BT = (process_BT - baseline_B[:, None]) * scale_B[:, None]
    return outcome_BT, reverse_cumsum(centred_BT, mask_BT, gamma_process)


def _leave_one_out(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Baseline: the mean of the other valid members."""
    count_B, comparable_B = _members(group_B, valid_B)
    others_B = group_sum(torch.where(valid_B, x_B, 0.0), group_B) - x_B
    return others_B / (count_B - 1).clamp(min=1), comparable_B.float()


def _released(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """`r K/(K-1) - S/(K-1)` is `(r - S/K) * K/(K-1)`."""
    count_B, comparable_B = _members(group_B, valid_B)
    scale_B = count_B / (count_B - 1).clamp(min=1)
    return group_mean(x_B, group_B, valid_B), torch.where(comparable_B, scale_B, 0.0)


def _standardised(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Baseline: the group's mean; scale: one over its unbiased standard deviation plus 1e-6."""
    count_B, comparable_B = _members(group_B, valid_B)
    mean_B = group_mean(x_B, group_B, valid_B)
    squares_B = group_sum(torch.where(valid_B, (x_B - mean_B) ** 2, 0.0), group_B)
    std_B = (squares_B / (count_B - 1).clamp(min=1)).sqrt()
    return mean_B, torch.where(comparable_B, 1 / (std_B + STD_EPSILON), 0.0)


def _centred(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Baseline: the group's mean, scale 1."""
    _, comparable_B = _members(group_B, valid_B)
    return group_mean(x_B, group_B, valid_B), comparable_B.float()


def _no_baseline(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Baseline 0, scale 1."""
    return torch.zeros_like(x_B), torch.ones_like(x_B)


def _members(group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """`[B]` number of valid members of each response's group, and whether they are two or more."""
    alone_B = valid_B & (group_sum(torch.ones_like(valid_B), group_B) == 1)
    if alone_B.any():
        group = int(group_B[alone_B][0])
        raise ValueError(
            f"Expected at least 2 responses in each group, got 1 in group {group} (and in {int(alone_B.sum())} groups"
            " in all); sampling.samples must be at least 2, and a group must not be split between batches."
        )
    count_B = group_sum(valid_B, group_B)
    return count_B, count_B >= 2


def _on_last(x_B: Tensor, mask_BT: Tensor) -> Tensor:
    """`[B, T]` zeros with `x_i` on the last token under the mask of response i; nowhere if there is none."""
    last_BT = mask_BT & (reverse_cumsum(mask_BT, mask_BT) == 1)
    return torch.where(last_BT, x_B[:, None], 0.0)


def _next(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`[B, T]` the value at the next token under the mask; 0 after the last one."""
    length = mask_BT.shape[-1]
    places_BT = torch.arange(length, device=mask_BT.device).expand_as(mask_BT).masked_fill(~mask_BT, length)
    from_here_BT = places_BT.flip(-1).cummin(-1).values.flip(-1)  # first masked token at or after t, else `length`
    ends_B1 = mask_BT.new_full((mask_BT.shape[0], 1), length, dtype=torch.long)
    after_BT = torch.cat([from_here_BT[:, 1:], ends_B1], dim=-1)
    padded_BT = torch.cat([values_BT, values_BT.new_zeros(values_BT.shape[0], 1)], dim=-1)
    return padded_BT.gather(-1, after_BT)
