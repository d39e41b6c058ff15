"""Past iterations for the PRM to learn from once more."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

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


def share(of_ranks: Sequence[list[dict[str, Any]]], rank: int, world: int) -> list[dict[str, Any]]:
    """A rank's share of the states that the ranks of a run saved, which may have been another number of ranks."""
    if len(of_ranks) == world:
        return of_ranks[rank]
    return [_rows(_joined(parts), rank, world) for parts in zip(*of_ranks, strict=True)]


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of all parts, padded with zeros to the widest."""
    joined = dict(parts[0])
    for name, value in joined.items():
        if isinstance(value, Tensor):
            width = max(part[name].shape[-1] for part in parts) if value.ndim == 2 else 0
            rows = [pad(part[name], (0, width - part[name].shape[1])) if width else part[name] for part in parts]
            joined[name] = torch.cat(rows)
    return joined


def _rows(whole: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """The groups of one rank."""
    mine = whole["group_B"] % world == rank
    return {name: value[mine] if isinstance(value, Tensor) else value for name, value in whole.items()}
