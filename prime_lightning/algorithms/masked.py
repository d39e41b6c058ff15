"""Arithmetic over masks and over groups: the floor that every formula of the algorithm stands on.

`aggregate` and `denominator` make one number of the losses of tokens. A row is a whole response, so that what is
reduced over one response is never spread over micro-batches.

Shapes in names: `B` responses, `T` response tokens. A mask is bool and True marks a token that the policy sampled and
that is trained on. `group_B` holds an arbitrary int per response; rollouts of one prompt share it, and groups may
differ in size. Whatever stands under a False, NaN too, reaches no result. Everything is computed in float32.

Nothing here knows about processes: where a number is to be global, the caller passes `all_reduce`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

AllReduce = Callable[[Tensor, str], Tensor]
"""`all_reduce(tensor, "sum" | "max")` returns the tensor reduced over ranks; None in its place means one process."""

Aggregation = Literal["token", "sequence", "constant"]
"""How token losses become one number."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 nats before `exp`: e^20 is 5e8, far beyond any clip bound, and finite."""

WHITEN_EPSILON = 1e-8
"""Added to the variance by `whiten`, as in the released code."""


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the entries under the mask: `sum_t mask_t x_t`; 0 where the mask is empty.

    Plain arithmetic of PRIME, arXiv 2502.01456. Selection is by `where`, not by a product, so that NaN and infinity
    outside the mask stay outside.

    Args:
        x: Any shape, any unit.
        mask: Bool, the shape of `x`.
        dim: The dimension to sum over; None sums over all.

    Raises:
        RuntimeError: From torch, when the shapes do not broadcast.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, float("nan")]])
        >>> masked_sum(x, torch.tensor([[True, True, False]]), dim=1)
        tensor([3.])
    """
    kept = torch.where(mask, x.float(), 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the entries under the mask: `sum_t mask_t x_t / sum_t mask_t`; 0, never NaN, where the mask is empty.

    The per-token mean of the baseline in PRIME, arXiv 2502.01456, Eq. 5.

    Args:
        x: Any shape, any unit.
        mask: Bool, the shape of `x`.
        dim: The dimension to average over; None averages over all.

    Raises:
        RuntimeError: From torch, when the shapes do not broadcast.

    Example:
        >>> x = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
        >>> masked_mean(x, torch.tensor([[True, True], [False, False]]), dim=1)
        tensor([2., 0.])
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def log_ratio(one_BT: Tensor, other_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`log(one / other)` of two policies' log-probs of each token, within +-20 nats and 0 outside the mask.

    The logarithm of the ratio of PRIME, arXiv 2502.01456, Eq. 6; `exp` of it is finite.

    Args:
        one_BT: `[B, T]` nats; gradients pass through.
        other_BT: `[B, T]` nats.
        mask_BT: `[B, T]` bool.

    Example:
        >>> log_ratio(torch.tensor([[-1.0, -99.0]]), torch.tensor([[-1.5, 0.0]]), torch.tensor([[True, True]]))
        tensor([[  0.5000, -20.0000]])
    """
    difference_BT = torch.where(mask_BT, one_BT.float() - other_BT.float(), 0.0)
    return difference_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


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


def whiten(x_BT: Tensor, mask_BT: Tensor, *, all_reduce: AllReduce | None = None) -> Tensor:
    """Shift to mean 0 and scale to variance 1 over all tokens: `(x - mean) * rsqrt(var + 1e-8)`.

    The released code of PRIME, arXiv 2502.01456, does it to the advantages; the paper does not mention it. The
    variance is the unbiased one. The released function leaves `-mean * rsqrt(var)` outside the mask; here it is 0.

    Args:
        x_BT: `[B, T]` any unit.
        mask_BT: `[B, T]` bool.
        all_reduce: Makes mean and variance those of all ranks. Every rank must call, also one without tokens.

    Example:
        >>> x_BT = torch.tensor([[1.0, 3.0, 99.0]])
        >>> whiten(x_BT, torch.tensor([[True, True, False]])).round(decimals=4)
        tensor([[-0.7071,  0.7071,  0.0000]])
    """
    reduce = all_reduce or _one_process
    x_BT = x_BT.float()
    total, count = reduce(torch.stack([masked_sum(x_BT, mask_BT), mask_BT.sum().float()]), "sum").unbind()
    centred_BT = torch.where(mask_BT, x_BT - total / count.clamp(min=1), 0.0)
    variance = reduce((centred_BT**2).sum(), "sum") / (count - 1).clamp(min=1)
    return centred_BT * torch.rsqrt(variance + WHITEN_EPSILON)


def reverse_cumsum(x_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted suffix sums `y_t = sum_{s>=t} gamma^(s-t) x_s`, the return of PRIME, arXiv 2502.01456, Eq. 5.

    `s - t` counts tokens under the mask: tokens outside it add nothing, take no time, and hold 0 in the result.
    Below gamma 1 this is an associative scan of `y_t = x_t + a_t y_{t+1}` by doubling: about log2(T) vector steps
    whose factors never exceed 1, where the textbook `cumsum(x gamma^t) / gamma^t` overflows.

    Args:
        x_BT: `[B, T]` rewards, any unit.
        mask_BT: `[B, T]` bool.
        gamma: Discount of one token, in [0, 1].

    Example:
        >>> x_BT = torch.tensor([[1.0, 2.0, 4.0, 99.0]])
        >>> reverse_cumsum(x_BT, torch.tensor([[True, True, True, False]]), gamma=0.5)
        tensor([[3., 4., 4., 0.]])
    """
    sums_BT = torch.where(mask_BT, x_BT.float(), 0.0)
    if gamma == 1.0:
        sums_BT = sums_BT.flip(-1).cumsum(-1).flip(-1)
        return torch.where(mask_BT, sums_BT, 0.0)
    decay_BT = torch.ones_like(sums_BT).masked_fill(mask_BT, gamma)
    span = 1  # sums_BT[t] covers the tokens [t, t + span), decay_BT[t] is what a token at t + span is worth at t
    while span < sums_BT.shape[-1]:
        head_BT = sums_BT[:, :-span] + decay_BT[:, :-span] * sums_BT[:, span:]
        sums_BT = torch.cat([head_BT, sums_BT[:, -span:]], dim=-1)
        decay_BT = torch.cat([decay_BT[:, :-span] * decay_BT[:, span:], decay_BT[:, -span:]], dim=-1)
        span *= 2
    return torch.where(mask_BT, sums_BT, 0.0)


def group_sum(x_B: Tensor, group_B: Tensor) -> Tensor:
    """Sum over the response's group, once per response: `y_i = sum_{j: group_j = group_i} x_j`.

    The sums over the K responses of one prompt in PRIME, arXiv 2502.01456, Eq. 4, 5 and 7.

    Args:
        x_B: `[B]` any unit, finite (zero what is to be left out).
        group_B: `[B]` int group ids.

    Example:
        >>> x_B = torch.tensor([1.0, 10.0, 2.0])
        >>> group_sum(x_B, torch.tensor([7, -1, 7]))
        tensor([ 3., 10.,  3.])
    """
    ids, index_B = torch.unique(group_B, return_inverse=True)
    totals = torch.zeros(len(ids), dtype=torch.float32, device=x_B.device)
    return totals.index_add(0, index_B, x_B.float())[index_B]


def group_mean(x_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """Mean over the valid members of the response's group, once per response; 0 where no member is valid.

    `mean_j` of PRIME, arXiv 2502.01456, Eq. 7.

    Args:
        x_B: `[B]` any unit; what stands at invalid members is not read.
        group_B: `[B]` int group ids.
        valid_B: `[B]` bool.

    Example:
        >>> x_B = torch.tensor([1.0, 3.0, float("nan")])
        >>> group_mean(x_B, torch.tensor([0, 0, 0]), torch.tensor([True, True, False]))
        tensor([2., 2., 2.])
    """
    total_B = group_sum(torch.where(valid_B, x_B.float(), 0.0), group_B)
    return total_B / group_sum(valid_B, group_B).clamp(min=1)


def group_pairs(outcome_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Index tensors `(i, j)` of all pairs of one group with `outcome_i > outcome_j`, both valid.

    The pairs of the DPO form of the PRM loss in PRIME, arXiv 2502.01456, App. C.2.

    Args:
        outcome_B: `[B]` outcome rewards; NaN is allowed at invalid members.
        group_B: `[B]` int group ids.
        valid_B: `[B]` bool.

    Returns:
        Two `[P]` int tensors, the better and the worse member of each of the P pairs.

    Example:
        >>> outcome_B, group_B = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([4, 4, 5])
        >>> group_pairs(outcome_B, group_B, torch.tensor([True, True, True]))
        (tensor([0]), tensor([1]))
    """
    together_BB = same_group(group_B, valid_B)
    better, worse = (together_BB & (outcome_B[:, None] > outcome_B[None, :])).nonzero(as_tuple=True)
    return better, worse


def same_group(group_B: Tensor, valid_B: Tensor) -> Tensor:
    """`[B, B]` bool: i and j are both valid and belong to one group; i belongs with itself.

    Which responses PRIME, arXiv 2502.01456, compares: those of one prompt.

    Args:
        group_B: `[B]` int group ids.
        valid_B: `[B]` bool.

    Example:
        >>> group_B = torch.tensor([4, 4])
        >>> same_group(group_B, torch.tensor([True, False]))
        tensor([[ True, False],
                [False, False]])
    """
    return (group_B[:, None] == group_B[None, :]) & valid_B[:, None] & valid_B[None, :]


def _one_process(tensor: Tensor, how: str) -> Tensor:
    """The `all_reduce` of a single process."""
    return tensor
