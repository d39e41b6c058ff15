"""Rewards: what a token is worth to the PRM, in which unit, from when on it is believed; and outcomes that are shaped.

Shapes in names: `B` responses, `T` response tokens. `mask_BT` is bool, True = a token the policy sampled and we train
on; rows without a known verdict are False throughout (pass `mask_BT & valid_B[:, None]`). Log-probs are in nats. A
shaping is a function `(outcome_B, length_B) -> reward_B`: advantages get what it returns, while labels of the PRM and
the filter stay as they are.

Left out: the losses that train the PRM (`prm_loss.py`), its figures of merit (`measures.py`), and credit
(`advantage.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import AllReduce, masked_sum, reverse_cumsum

Granularity = Literal["token", "step", "response"]
"""Where the process reward is paid out."""

Normalisation = Literal["none", "batch_max", "batch_std"]
"""What the process reward is divided by."""

SCALE_EPSILON = 1e-6
"""Added to the scale by `normalise`, as in the released code."""


def process_reward(prm_logprobs_BT: Tensor, reference_logprobs_BT: Tensor, mask_BT: Tensor, *, beta: float) -> Tensor:
    """Implicit process reward of each token: `r(y_t) = beta * log[prm(y_t | y_<t) / reference(y_t | y_<t)]`.

    PRIME, arXiv 2502.01456, Eq. 3. Its sum over a response is the reward that the PRM loss is about. The released
    code leaves beta out where the policy is concerned; `beta=1` with `normalise(..., "batch_max")` is that.

    Args:
        prm_logprobs_BT: `[B, T]` nats; gradients pass through.
        reference_logprobs_BT: `[B, T]` nats.
        mask_BT: `[B, T]` bool.
        beta: Reward per nat, positive.

    Returns:
        `[B, T]` float32, 0 outside the mask.

    Raises:
        ValueError: If beta is not positive.

    Example:
        >>> prm_BT, reference_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]])
        >>> process_reward(prm_BT, reference_BT, torch.tensor([[True, True]]), beta=0.5)
        tensor([[0.5000, 0.0000]])
    """
    if not beta > 0:
        raise ValueError(f"Expected `beta` positive, got {beta}; the paper trains with 0.05.")
    return torch.where(mask_BT, beta * (prm_logprobs_BT.float() - reference_logprobs_BT.float()), 0.0)


def to_granularity(
    process_BT: Tensor, mask_BT: Tensor, granularity: Granularity, step_ids_BT: Tensor | None = None
) -> Tensor:
    """Pay the process reward out per token, per step or per response; the sum of a response stays the same.

    A step's (or response's) last token under the mask gets `sum_{t in step} r_t`, the others 0: by the identity
    `q_t = sum_{i<=t} r_i` (arXiv 2412.01981, Prop. 3.1) that is the difference of the Q values at the step's two
    ends. `token` is Eq. 3 of PRIME, arXiv 2502.01456, as it stands; `response` is the released code's `whole`.

    Args:
        process_BT: `[B, T]` process reward.
        mask_BT: `[B, T]` bool.
        granularity: "token", "step" or "response".
        step_ids_BT: `[B, T]` ints that number the steps inside each response; for "step" only.

    Returns:
        `[B, T]` float32, 0 outside the mask.

    Raises:
        ValueError: If the granularity is unknown, or is "step" without `step_ids_BT`.

    Example:
        >>> process_BT, mask_BT = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]])
        >>> to_granularity(process_BT, mask_BT, "step", torch.tensor([[0, 0, 1]]))
        tensor([[0., 3., 4.]])
    """
    process_BT = torch.where(mask_BT, process_BT.float(), 0.0)
    if granularity == "token":
        return process_BT
    if granularity == "response":
        step_ids_BT = torch.zeros_like(mask_BT, dtype=torch.long)
    elif granularity != "step":
        raise ValueError(f"Expected `granularity` token, step or response, got {granularity!r}.")
    if step_ids_BT is None:
        raise ValueError('Expected `step_ids_BT` with granularity "step", got None; pass the steps or use "token".')
    rows, columns = mask_BT.nonzero(as_tuple=True)
    places = torch.stack([rows, step_ids_BT[rows, columns].long()])
    steps, step_of_token = torch.unique(places, dim=1, return_inverse=True)
    count = steps.shape[1]
    sums = process_BT.new_zeros(count).index_add(0, step_of_token, process_BT[rows, columns])
    last = columns.new_zeros(count).scatter_reduce(0, step_of_token, columns, "amax")
    return torch.zeros_like(process_BT).index_put((steps[0], last), sums)


def normalise(
    process_BT: Tensor, mask_BT: Tensor, how: Normalisation, *, all_reduce: AllReduce | None = None
) -> tuple[Tensor, Tensor]:
    """Divide the process reward by one number, so that its returns are of the size of the outcome reward.

    With `q_t = sum_{s>=t} r_s`, the undiscounted return inside a response: `batch_max` divides by
    `max |q_t| + 1e-6` over the batch (`batch_norm` in the released code of PRIME, arXiv 2502.01456, which takes it
    over each rank alone: a different unit on every rank); `batch_std` by `sqrt(mean q_t^2) + 1e-6`, which one long
    response cannot set alone. Both blow up the rounding noise of a PRM that still equals its reference: `ProcessGate`.

    Args:
        process_BT: `[B, T]` process reward.
        mask_BT: `[B, T]` bool.
        how: "none", "batch_max" or "batch_std".
        all_reduce: Makes the scale that of all ranks. Every rank must call.

    Returns:
        The `[B, T]` normalised reward, 0 outside the mask, and the `[]` scale it was divided by (1 for "none").

    Raises:
        ValueError: If `how` is unknown.

    Example:
        >>> process_BT, mask_BT = torch.tensor([[1.0, -3.0]]), torch.tensor([[True, True]])
        >>> normalise(process_BT, mask_BT, "batch_max")[1]
        tensor(3.0000)
    """
    process_BT = torch.where(mask_BT, process_BT.float(), 0.0)
    if how == "none":
        return process_BT, process_BT.new_ones(())
    return_BT = reverse_cumsum(process_BT.detach(), mask_BT)
    if how == "batch_max":
        scale = return_BT.abs().amax() if return_BT.numel() else return_BT.new_zeros(())
        scale = all_reduce(scale, "max") if all_reduce else scale
    elif how == "batch_std":
        sums = torch.stack([masked_sum(return_BT**2, mask_BT), mask_BT.sum().float()])
        squares, count = (all_reduce(sums, "sum") if all_reduce else sums).unbind()
        scale = (squares / count.clamp(min=1)).sqrt()
    else:
        raise ValueError(f"Expected `how` none, batch_max or batch_std, got {how!r}.")
    scale = scale + SCALE_EPSILON
    return process_BT / scale, scale


class ProcessGate:
    """Weight of the process reward: 0 while the PRM knows nothing, then a linear ramp to 1. Not in the paper.

    A PRM that has learned nothing has a CE of log 2 and orders half of the pairs rightly, and normalising its reward
    makes noise as large as the outcome reward (PRIME, arXiv 2502.01456, released code, at the first step).

    State: `iteration` (calls of `update` so far), `ce` and `accuracy` (running means, None until first measured) and a
    level in 0..ramp; `weight = level / ramp`, 0 at the start. One `update(ce, accuracy)` is one iteration:

    1. A finite number goes into its running mean, `m <- momentum * m + (1 - momentum) * x`, the first as it is. An
       accuracy of None or NaN (no pair in the batch) leaves its mean as it was.
    2. The PRM is *trusted* when this call is number `after` or later (the first is number 0), this `ce` is finite,
       the mean CE is below `max_ce` and the mean accuracy is above `min_accuracy`. `max_ce=None` and
       `min_accuracy=0` switch their conditions off; an accuracy never measured does not pass one that is on.
    3. Trusted: the level rises by one, to at most `ramp`. Otherwise it falls by one, to at least 0; to 0 at once when
       this `ce` is not finite, for then neither are the rewards.

    After `close()` the weight is 0 whatever the level.

    Args:
        after: Iterations during which the weight is 0 whatever the PRM does.
        max_ce: Mean CE in nats that the PRM must stay below; None for no such condition.
        min_accuracy: Mean pairwise accuracy that the PRM must stay above; 0 for no such condition.
        ramp: Iterations from weight 0 to weight 1.
        momentum: Share of the old running mean in the new one, in [0, 1).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> gate = ProcessGate(ramp=2, momentum=0.0)
        >>> print(gate.update(ce=0.6, accuracy=0.7), gate.update(0.6, None), gate.update(0.8, 0.7))
        0.5 1.0 0.5
    """

    def __init__(
        self,
        after: int = 0,
        max_ce: float | None = math.log(2),
        min_accuracy: float = 0.5,
        ramp: int = 1,
        momentum: float = 0.9,
    ) -> None:
        for name, value, ok, expected in (
            ("after", after, after >= 0, "0 or more iterations"),
            ("max_ce", max_ce, max_ce is None or max_ce > 0, "positive nats, or None for no such condition"),
            ("min_accuracy", min_accuracy, 0 <= min_accuracy < 1, "in [0, 1)"),
            ("ramp", ramp, ramp >= 1, "at least 1 iteration"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(f"Expected gate `{name}` {expected}, got {value}.")
        self.after, self.max_ce, self.min_accuracy = after, max_ce, min_accuracy
        self.ramp, self.momentum = ramp, momentum
        self.iteration = 0
        self.ce: float | None = None
        self.accuracy: float | None = None
        self.closed = False
        self._level = 0

    @property
    def weight(self) -> float:
        """What to multiply the process reward by, in [0, 1]."""
        return 0.0 if self.closed else self._level / self.ramp

    def close(self) -> None:
        """Keep the process reward out for good."""
        self.closed = True

    def update(self, ce: float, accuracy: float | None) -> float:
        """Take in one iteration's CE (nats) and pairwise accuracy (None or NaN without a pair); the new weight."""
        self.ce = self._mean(self.ce, ce)
        self.accuracy = self._mean(self.accuracy, math.nan if accuracy is None else accuracy)
        trusted = (
            self.iteration >= self.after
            and math.isfinite(ce)
            and (self.max_ce is None or (self.ce is not None and self.ce < self.max_ce))
            and (self.min_accuracy == 0 or (self.accuracy is not None and self.accuracy > self.min_accuracy))
        )
        self._level = min(self._level + 1, self.ramp) if trusted else max(self._level - 1, 0)
        if not math.isfinite(ce):
            self._level = 0
        self.iteration += 1
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; plain numbers and None."""
        weight = self._level / self.ramp
        return {
            "iteration": self.iteration,
            "weight": weight,
            "ce": self.ce,
            "accuracy": self.accuracy,
            "closed": self.closed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state. The weight carries over to a `ramp` of another length, rounded to its levels."""
        self.iteration, self.ce, self.accuracy = state["iteration"], state["ce"], state["accuracy"]
        self._level = round(state["weight"] * self.ramp)
        self.closed = bool(state.get("closed", False))

    def _mean(self, mean: float | None, value: float) -> float | None:
        """The running mean after one more value; unchanged by a value that is not finite."""
        if not math.isfinite(value):
            return mean
        return value if mean is None else self.momentum * mean + (1 - self.momentum) * value


@dataclass(frozen=True, kw_only=True)
class OverlongPenalty:
    """Less reward for the last tokens that a response may have: `o + w clip((L - cache - |y|) / cache, -1, 0)`.

    The soft overlong punishment of DAPO, arXiv 2503.14476, Eq. 13: 0 up to `L - cache` tokens, then linearly down to -1
    at L tokens, the longest response allowed. There outcomes are -1 and 1; a weight of 1/2 is the same in a unit of 0
    and 1.

    Raises:
        ValueError: If `cache` is not in 1..max_tokens, or the weight is negative.

    Example:
        >>> import torch
        >>> OverlongPenalty(max_tokens=10, cache=4)(torch.ones(3), torch.tensor([6, 8, 10]))
        tensor([1.0000, 0.7500, 0.5000])
    """

    max_tokens: int
    """L, the longest response allowed, in tokens: `data.sampling.max_tokens`."""
    cache: int
    """The last tokens of L, over which the penalty grows."""
    weight: float = 0.5
    """Reward that a response of L tokens loses."""

    def __post_init__(self) -> None:
        if not 1 <= self.cache <= self.max_tokens:
            raise ValueError(
                f"Expected `cache` of 1 to `max_tokens` ({self.max_tokens}) tokens, got {self.cache}; DAPO has a fifth."
            )
        if self.weight < 0:
            raise ValueError(f"Expected `weight` of 0 or more, got {self.weight}.")

    def __call__(self, outcome_B: Tensor, length_B: Tensor) -> Tensor:
        """The shaped rewards.

        Args:
            outcome_B: `[B]` outcome rewards.
            length_B: `[B]` tokens of each response.
        """
        spare_B = self.max_tokens - self.cache - length_B.to(outcome_B.device)
        return outcome_B + self.weight * (spare_B / self.cache).clamp(-1, 0)
