"""What is added to outcome rewards before they become advantages; labels of the PRM and the filter stay as they are.

Shapes in names: `B` responses. A shaping is a function `(outcome_B, length_B) -> reward_B`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
