"""Losses that train the implicit PRM, all of one type: `loss(reward_B, outcome_B, group_B, valid_B) -> (sum, count)`.

Shapes in names: `B` responses. `reward_B` is `beta * sum_t log(prm / reference)`, with gradients; `outcome_B` the
outcome reward in [0, 1], NaN allowed where invalid; `group_B` any int per prompt; `valid_B` False = no known verdict.

The loss is `sum / count`, with both summed over micro-batches and ranks first. `count` depends on outcome, group and
valid alone, never on the rewards, so it can be had beforehand by a call with zeros. A loss without the attribute
`whole_groups = False` must see all members of a group in one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from prime_lightning.algorithms.masked import group_pairs, same_group

PrmLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(reward_B, outcome_B, group_B, valid_B) -> (sum over terms, number of terms)`."""

_Loss = TypeVar("_Loss", bound=PrmLoss)


def per_response(loss: _Loss) -> _Loss:
    """Mark a PRM loss as a sum over single responses: a group may then be split between calls.

    `CE` in PRIME, arXiv 2502.01456, `L = sum_i l(r_i, o_i)`, is one; a pairwise loss is none.

    Args:
        loss: The function to mark; it gets the attribute `whole_groups = False`.

    Raises:
        AttributeError: If the callable takes no attributes.

    Example:
        >>> marked = per_response(lambda reward_B, outcome_B, group_B, valid_B: (reward_B.sum(), valid_B.sum()))
        >>> marked.whole_groups
        False
    """
    loss.whole_groups = False  # type: ignore[attr-defined]
    return loss


@per_response
def ce(reward_B: Tensor, outcome_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy with the outcome: `-sum_i [o_i log sigmoid(r_i) + (1 - o_i) log(1 - sigmoid(r_i))]`.

    PRIME, arXiv 2502.01456, section 3 (L_CE). One term per valid response; an outcome between 0 and 1 (code) is a
    soft label. In logits form: the released `sigmoid` followed by `binary_cross_entropy` has no gradient once the
    float32 sigmoid is 1, at a reward of about 17.

    Returns:
        `[]` sum in nats and `[]` number of valid responses.

    Example:
        >>> outcome_B, group_B = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
        >>> ce(torch.zeros(2), outcome_B, group_B, torch.tensor([True, True]))  # 2 log 2
        (tensor(1.3863), tensor(2))
    """
    reward_B, outcome_B = torch.where(valid_B, reward_B.float(), 0.0), torch.where(valid_B, outcome_B.float(), 0.0)
    terms_B = binary_cross_entropy_with_logits(reward_B, outcome_B, reduction="none")
    return torch.where(valid_B, terms_B, 0.0).sum(), valid_B.sum()


def dpo(reward_B: Tensor, outcome_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs of a group: `-sum_{(i,j): o_i > o_j} log sigmoid(r_i - r_j)`.

    PRIME, arXiv 2502.01456, App. C.2: a constant per prompt cancels, so the loss can reach 0 where CE cannot.

    Returns:
        `[]` sum in nats and `[]` number of pairs. A group of equal outcomes, or of one member, has no pair.

    Example:
        >>> outcome_B, group_B = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0])
        >>> dpo(torch.zeros(3), outcome_B, group_B, torch.tensor([True, True, True]))  # 2 log 2
        (tensor(1.3863), tensor(2))
    """
    better, worse = group_pairs(outcome_B, group_B, valid_B)
    reward_B = torch.where(valid_B, reward_B.float(), 0.0)
    terms = -logsigmoid(reward_B[better] - reward_B[worse])
    return terms.sum(), valid_B.new_tensor(better.numel(), dtype=torch.long)


def dpo_detached(reward_B: Tensor, outcome_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor]:
    """Each response against the detached mean of its opponents: `-sum_i log sigmoid(s_i (r_i - mean_j r_j))`.

    `compute_detach_dpo_loss_rm`, mode `none`, of the verl recipe of PRIME, arXiv 2502.01456. `s_i` is +1 where the
    outcome is above 0 and -1 where it is 0. The opponents of i are the group's members with a smaller outcome if
    `s_i = 1`, with a larger one if `s_i = -1`; without any the mean is 0 and the term is that of `ce` with the label
    rounded. So partly right code counts as right here. The recipe scores the opponents before the update, for all
    micro-batches; here they are the rewards of this call.

    Returns:
        `[]` sum in nats and `[]` number of valid responses.

    Example:
        >>> outcome_B, group_B = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
        >>> dpo_detached(torch.zeros(2), outcome_B, group_B, torch.tensor([True, True]))  # 2 log 2
        (tensor(1.3863), tensor(2))
    """
    reward_B, opponent_B, sign_B = _opposed(reward_B, outcome_B, group_B, valid_B)
    terms_B = torch.where(valid_B, -logsigmoid((reward_B - opponent_B) * sign_B), 0.0)
    return terms_B.sum(), valid_B.sum()


def kto(
    reward_B: Tensor,
    outcome_B: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    *,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Kahneman-Tversky optimisation: `sum_i lambda_i (1 - sigmoid(s_i (r_i - z_i)))`, the paper's up to a constant.

    KTO, arXiv 2402.01306, one of the objectives of ImplicitPRM, arXiv 2412.01981. `s_i` is +1 where the
    outcome is above 0 and -1 where it is 0. The paper's reference point is one KL estimate a batch, from prompts with
    the responses of other prompts, which costs a second forward. Here it is what the authors' code takes where both
    kinds are at hand: `z_i = max(0, mean_j r_j)` over the opponents of i as in `dpo_detached`, without gradient, and
    0 where there are none. Terms are bounded, so a mislabelled response pulls less than in `ce`. `desirable` and
    `undesirable` weigh right and wrong responses; the paper balances the classes with them.

    Returns:
        `[]` sum (no unit) and `[]` number of valid responses.

    Example:
        >>> outcome_B, group_B = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
        >>> kto(torch.zeros(2), outcome_B, group_B, torch.tensor([True, True]))  # 2 sigmoid(0)
        (tensor(1.), tensor(2))
    """
    reward_B, opponent_B, sign_B = _opposed(reward_B, outcome_B, group_B, valid_B)
    weight_B = torch.where(sign_B > 0, desirable, undesirable)
    terms_B = weight_B * torch.sigmoid(-sign_B * (reward_B - opponent_B.clamp(min=0)))
    return torch.where(valid_B, terms_B, 0.0).sum(), valid_B.sum()


def nca(
    reward_B: Tensor, outcome_B: Tensor, group_B: Tensor, valid_B: Tensor, *, alpha: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Noise contrastive alignment: `-sum_i [w_i log sigmoid(r_i) + (1/K) log sigmoid(-r_i)]`, once a prompt.

    NCA, arXiv 2402.05369, one of the objectives of ImplicitPRM, arXiv 2412.01981. `w` is the softmax of
    `outcome / alpha` over the K valid responses of the prompt, so with the default the right ones share a weight of
    1. With one right and one wrong response it is `-log sigmoid(r_+) - log sigmoid(-r_+) / 2 - log sigmoid(-r_-) / 2`.
    A prompt whose outcomes are all equal pulls its rewards to 0. `alpha` is a temperature, positive.

    Returns:
        `[]` sum in nats and `[]` number of prompts with a valid response.

    Raises:
        ValueError: If alpha is not positive.

    Example:
        >>> outcome_B, group_B = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
        >>> nca(torch.zeros(2), outcome_B, group_B, torch.tensor([True, True]))  # 2 log 2
        (tensor(1.3863), tensor(1))
    """
    if not alpha > 0:
        raise ValueError(f"Expected `alpha` positive, got {alpha}.")
    reward_B = torch.where(valid_B, reward_B.float(), 0.0)
    logit_B = torch.where(valid_B, outcome_B.float(), 0.0) / alpha
    together_BB = same_group(group_B, valid_B)
    total_B = torch.where(together_BB, logit_B[None, :], -torch.inf).logsumexp(1)
    count_B = together_BB.sum(1).clamp(min=1)
    terms_B = -((logit_B - total_B).exp() * logsigmoid(reward_B) + logsigmoid(-reward_B) / count_B)
    return torch.where(valid_B, terms_B, 0.0).sum(), valid_B.new_tensor(
        group_B[valid_B].unique().numel(), dtype=torch.long
    )


class BaseRate:
    """Running share `p` of right answers, and its log-odds `b = log(p / (1 - p))`: an intercept for `ce`.

    Not in the paper. CE fits `sigmoid(r + b)` to the outcome, so the reward has to say only what a response says
    beyond the base rate: `r = logit P(right | response) - logit p`, which is 0 for one that says nothing. Without it a
    PRM starts at `sigmoid(0)`, and where one answer in twenty is right it first makes all tokens less likely. The
    constant is the `c(x)` of PRIME, arXiv 2502.01456, App. C.2, given instead of learned; it cancels in pairwise losses
    and in group baselines.

    An iteration with `k` right of `n` answers has `m = (k + 1/2) / (n + 1)`, which no odds make infinite; then
    `p <- momentum p + (1 - momentum) m`, the first as it is. An iteration without answers changes nothing.

    Args:
        momentum: Share of the old rate in the new one, in [0, 1).

    Raises:
        ValueError: If the momentum is out of its range.

    Example:
        >>> rate = BaseRate()
        >>> print(rate.intercept, round(rate.update(right=0.0, count=9.0), 3))  # p = 0.5 / 10
        0.0 -2.944
    """

    def __init__(self, momentum: float = 0.7) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected `momentum` in [0, 1), got {momentum}.")
        self.momentum = momentum
        self.rate: float | None = None

    @property
    def intercept(self) -> float:
        """Log-odds of the rate in nats; 0 before the first answer."""
        return 0.0 if self.rate is None else math.log(self.rate / (1 - self.rate))

    def update(self, right: float, count: float) -> float:
        """Take in one iteration's sum of outcomes and number of answers; the new intercept."""
        if count > 0:
            mean = (right + 0.5) / (count + 1)
            self.rate = mean if self.rate is None else self.momentum * self.rate + (1 - self.momentum) * mean
        return self.intercept

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"rate": self.rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self.rate = state["rate"]


def _opposed(reward_B: Tensor, outcome_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B]` rewards (0 where invalid), detached means of their opponents, and +1 for right or -1 for wrong."""
    reward_B = torch.where(valid_B, reward_B.float(), 0.0)
    right_B = outcome_B > 0
    own_B1, other_1B = outcome_B[:, None], outcome_B[None, :]
    opposed_BB = torch.where(right_B[:, None], other_1B < own_B1, other_1B > own_B1) & same_group(group_B, valid_B)
    # A masked sum and not a matrix product, which TF32 or autocast would round to ten bits or fewer.
    opponent_B = torch.where(opposed_BB, reward_B.detach()[None, :], 0.0).sum(1) / opposed_BB.sum(1).clamp(min=1)
    return reward_B, opponent_B, torch.where(right_B, 1.0, -1.0)
