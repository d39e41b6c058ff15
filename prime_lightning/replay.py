"""Past iterations for the PRM to learn from once more."""

from __future__ import annotations

from collections import deque
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from prime_lightning.batch import Batch
from prime_lightning.measures import Measures


class Replay:
    """The last `size` batches with their reference log-probs, on the CPU.

    Args:
        size: Batches kept; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        self._kept: deque[tuple[Batch, Tensor]] = deque(maxlen=size)

    def add(self, batch: Batch, reference_logprobs_BT: Tensor) -> None:
        """Keep this iteration and forget the oldest."""
        if self._kept.maxlen:
            lean = replace(batch, rollouts=[], metrics=Measures())
            self._kept.append((lean.to("cpu"), reference_logprobs_BT.cpu()))

    def draw(self, generator: torch.Generator, device: torch.device) -> list[tuple[Batch, Tensor]]:
        """One past batch at random, in a list; an empty list if there is none."""
        if not self._kept:
            return []
        batch, reference_logprobs_BT = self._kept[int(torch.randint(len(self._kept), (), generator=generator))]
        return [(batch.to(device), reference_logprobs_BT.to(device))]

    def state_dict(self) -> list[dict[str, Any]]:
        """Tensors and numbers only."""
        names = [f.name for f in fields(Batch) if f.name not in ("rollouts", "metrics")]
        return [
            {"reference_logprobs_BT": reference, **{name: getattr(batch, name) for name in names}}
            for batch, reference in self._kept
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take up saved batches."""
        self._kept.clear()
        for saved in state:
            row = dict(saved)
            reference = row.pop("reference_logprobs_BT")
            self._kept.append((Batch(**row), reference))
