"""Figures of merit of the PRM, from rewards it gave before it was trained on the same responses.

Shapes in names: `B` responses. `reward_B` is `beta * sum_t log(prm / reference)`; `outcome_B` the outcome reward in
[0, 1], NaN allowed where invalid; `valid_B` False = no known verdict. Results are detached scalar tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import group_pairs


def pairwise_accuracy(reward_B: Tensor, outcome_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of one group that the PRM orders as the verifier does: `sum_{(i,j): o_i > o_j} [r_i > r_j]`.

    The accuracy plotted in PRIME, arXiv 2502.01456, Fig. 4 (`compute_dpo_accuracy`). A tie in reward counts one half.
    For outcomes 0 and 1, `sum / count` of one group without ties is the released number of that group. The released
    code differs in three ways: it averages over groups instead of over pairs, with 0.5 for a group that has none; it
    weighs a pair by `o_i - o_j`; and a tie is right or wrong by the order in which the two stand in the batch, so a
    PRM that still equals its reference may score anything from 0 to 1.

    Args:
        reward_B: `[B]` sequence rewards.
        outcome_B: `[B]` outcome rewards.
        group_B: `[B]` int group ids; all members of a group in one call.
        valid_B: `[B]` bool.

    Returns:
        `[]` number of pairs ordered rightly and `[]` number of pairs; sum both over calls and ranks, then divide.

    Raises:
        RuntimeError: From torch, when the shapes differ.

    Example:
        >>> outcome_B, group_B = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0])
        >>> pairwise_accuracy(torch.tensor([2.0, 1.0, 2.0]), outcome_B, group_B, torch.tensor([True] * 3))
        (tensor(1.5000), tensor(2))
    """
    better, worse = group_pairs(outcome_B, group_B, valid_B)
    difference = reward_B.detach().float()[better] - reward_B.detach().float()[worse]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return right.sum(), valid_B.new_tensor(better.numel(), dtype=torch.long)


def auc(reward_B: Tensor, outcome_B: Tensor, valid_B: Tensor) -> Tensor:
    """Chance that a right response outranks a wrong one, of whatever prompts: `P(r_+ > r_-) + P(r_+ = r_-) / 2`.

    The area under the ROC curve of the sequence reward of PRIME, arXiv 2502.01456, Eq. 3. Unlike
    `pairwise_accuracy` it compares across prompts, so it also sees the constant per prompt that the group baseline
    cancels. Right is an outcome above 0.5.

    Args:
        reward_B: `[B]` sequence rewards; gather them first where there are several ranks.
        outcome_B: `[B]` outcome rewards.
        valid_B: `[B]` bool.

    Returns:
        `[]` in [0, 1]; NaN where one of the two kinds is missing.

    Raises:
        RuntimeError: From torch, when the shapes differ.

    Example:
        >>> reward_B, outcome_B = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
        >>> auc(reward_B, outcome_B, torch.tensor([True, True, True]))
        tensor(0.5000)
    """
    reward_B = reward_B.detach().float()
    right = reward_B[valid_B & (outcome_B > 0.5)].contiguous()
    wrong = reward_B[valid_B & ~(outcome_B > 0.5)].sort().values
    below = torch.searchsorted(wrong, right, right=False)
    not_above = torch.searchsorted(wrong, right, right=True)
    return ((below + not_above).float() / (2 * wrong.numel())).mean() if wrong.numel() else wrong.new_tensor(torch.nan)


def calibration_error(reward_B: Tensor, outcome_B: Tensor, valid_B: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error of `p = sigmoid(r)`: `sum_b (n_b / n) |mean_b(p) - mean_b(o)|` over equal-width bins.

    `sigmoid(r)` is what CE trains to be the chance of a right answer (PRIME, arXiv 2502.01456, L_CE).

    Args:
        reward_B: `[B]` sequence rewards; gather them first where there are several ranks.
        outcome_B: `[B]` outcome rewards, fractions allowed.
        valid_B: `[B]` bool.
        bins: How many bins [0, 1] is cut into.

    Returns:
        `[]` in [0, 1]; NaN where no response is valid.

    Raises:
        ValueError: If there is not at least one bin.

    Example:
        >>> reward_B, outcome_B = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 0.0])
        >>> calibration_error(reward_B, outcome_B, torch.tensor([True] * 4))  # |0.5 - 0.75|
        tensor(0.2500)
    """
    if bins < 1:
        raise ValueError(f"Expected at least 1 in `bins`, got {bins}.")
    chance = reward_B.detach().float()[valid_B].sigmoid()
    gap = chance - outcome_B.float()[valid_B]
    index = (chance * bins).long().clamp(0, bins - 1)
    gap_of_bin = chance.new_zeros(bins).index_add(0, index, gap)
    return gap_of_bin.abs().sum() / gap.numel() if gap.numel() else chance.new_tensor(torch.nan)
