"""The parts of an advantage in one unit: what the outcome, the process reward and a KL penalty contribute.

Shapes in names: `B` responses, `T` response tokens. `mask_BT` True = a token we train on; `valid_B` False = no known
verdict. Estimators are in `advantage.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import group_sum, masked_mean, reverse_cumsum

Silent = Literal["none", "all_wrong", "all"]
"""Groups without outcome signal that are looked for: no group, those without any right answer, or all of them."""


def without_signal(outcome_B: Tensor, group_B: Tensor, valid_B: Tensor, which: Silent) -> Tensor:
    """Responses of groups whose outcomes tell no member from another: `o_i = o_j` for all valid i and j, two or more.

    Their outcome advantage is 0 (PRIME, arXiv 2502.01456, Eq. 4), so that only a process reward can rank them.

    Args:
        outcome_B: `[B]` outcome rewards.
        group_B: `[B]` int group ids; all members of a group in one call.
        valid_B: `[B]` bool.
        which: "all_wrong" for groups whose outcomes are 0, "all" for these and others, "none" for no group.

    Returns:
        `[B]` bool.

    Example:
        >>> outcome_B, group_B = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> without_signal(outcome_B, group_B, torch.ones(6).bool(), "all_wrong")
        tensor([ True,  True, False, False, False, False])
    """
    outcome_B = torch.where(valid_B, outcome_B.float(), 0.0)
    together_BB = (group_B[:, None] == group_B[None, :]) & valid_B[None, :]
    differs_B = (together_BB & (outcome_B[:, None] != outcome_B[None, :])).any(1) & valid_B
    several_B = group_sum(valid_B, group_B) >= 2
    silent_B = several_B & (group_sum(differs_B, group_B) == 0)
    if which == "all_wrong":
        return silent_B & (group_sum(outcome_B, group_B) == 0)
    return silent_B if which == "all" else torch.zeros_like(silent_B)


def per_step(credit_BT: Tensor, mask_BT: Tensor, step_ids_BT: Tensor) -> Tensor:
    """Give each token of a step the credit of the whole step: `A_t = sum_{s in step(t)} a_s`.

    With `gamma_process: 0` the credit of a token is its centred process reward, the difference of the Q values at its
    two ends (arXiv 2412.01981, Prop. 3.1); that of a step is the difference at the step's ends, and a step is then one
    action.

    Args:
        credit_BT: `[B, T]` credit of single tokens.
        mask_BT: `[B, T]` bool.
        step_ids_BT: `[B, T]` ints from 0 that number the steps inside each response.

    Returns:
        `[B, T]`, 0 outside the mask.

    Example:
        >>> credit_BT, mask_BT = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]])
        >>> per_step(credit_BT, mask_BT, torch.tensor([[0, 0, 1]]))
        tensor([[3., 3., 4.]])
    """
    credit_BT = torch.where(mask_BT, credit_BT, 0.0)
    sums = torch.zeros_like(credit_BT).scatter_add(1, step_ids_BT, credit_BT)  # no more steps than tokens
    return torch.where(mask_BT, sums.gather(1, step_ids_BT), 0.0)


def kl_credit(
    kl_BT: Tensor,
    mask_BT: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    *,
    weight: float,
    gamma: float = 1.0,
    baseline: bool = True,
) -> Tensor:
    """What a KL penalty in the reward costs: `A_t = -w sum_{s>=t} gamma^(s-t) [kl_s - 1/(K-1) sum_{j!=i} m_j]`.

    The token penalty of Ziegler et al., arXiv 1909.08593, with the leave-one-out baseline of PRIME, arXiv 2502.01456,
    Eq. 5; `m_j` is the per-token mean of response j. It is apart from the estimators, since one that normalises would
    lose the weight. A response without a valid fellow has no baseline here.

    Args:
        kl_BT: `[B, T]` nats a token.
        mask_BT: `[B, T]` bool.
        group_B: `[B]` int group ids.
        valid_B: `[B]` bool.
        weight: Reward per nat.
        gamma: Discount, in [0, 1].
        baseline: False for none, where a critic has learned the penalty.

    Example:
        >>> ones_BT = torch.ones(2, 1).bool()
        >>> kl_credit(torch.tensor([[0.5], [0.1]]), ones_BT, torch.zeros(2), ones_BT[:, 0], weight=10.0)
        tensor([[-4.],
                [ 4.]])
    """
    mask_BT = mask_BT & valid_B[:, None]
    reward_BT = torch.where(mask_BT, -weight * kl_BT.detach().float(), 0.0)
    if baseline:
        mean_B = torch.where(valid_B, masked_mean(reward_BT, mask_BT, dim=1), 0.0)
        count_B = group_sum(valid_B, group_B)
        others_B = (group_sum(mean_B, group_B) - mean_B) / (count_B - 1).clamp(min=1)
        reward_BT = reward_BT - torch.where(count_B >= 2, others_B, 0.0)[:, None]
    return reverse_cumsum(reward_BT, mask_BT, gamma)
