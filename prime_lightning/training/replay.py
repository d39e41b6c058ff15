"""What the PRM learned from in past iterations, for it to learn from once more."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from prime_lightning.algorithms.measures import Measures
from prime_lightning.models.batch import Batch, join, padded_cat
from prime_lightning.training.options import Replaying

COLUMNS = ("reference_logprobs_BT", "intercept_B", "groups", "most_megabytes")
NOT_KEPT = ("rollouts", "metrics", "rejected", "accepted")


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Graded responses that the PRM learns from together, this rank's share of them."""

    batch: Batch
    reference_logprobs_BT: Tensor
    """`log pi_ref` of their tokens."""
    intercept_B: Tensor
    """What is added to the response rewards in the loss, see `algorithms.BaseRate`."""
    groups: int
    """Of all ranks; their numbers are 0 to this."""
    most_megabytes: float = 0.0
    """`megabytes` of the rank that has the most."""

    @property
    def megabytes(self) -> float:
        """Of this rank's tensors."""
        columns = [getattr(self.batch, f.name) for f in fields(Batch) if f.type == "Tensor"]
        tensors = [*columns, self.reference_logprobs_BT, self.intercept_B]
        return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors)) / 1e6

    def to(self, device: torch.device | str) -> Lessons:
        """The same on another device."""
        moved = self.reference_logprobs_BT.to(device), self.intercept_B.to(device)
        return replace(self, batch=self.batch.to(device), reference_logprobs_BT=moved[0], intercept_B=moved[1])

    def part(self, number_B: Tensor) -> Lessons | None:
        """The rows that get a number of 0 or more, which becomes that of their group; None if there are none."""
        rows = (number_B >= 0).nonzero().squeeze(-1)
        if not len(rows):
            return None
        batch = replace(self.batch.select(rows), group_B=number_B[rows])
        reference_BT = self.reference_logprobs_BT[rows, : batch.mask_BT.shape[1]]
        return replace(self, batch=batch, reference_logprobs_BT=reference_BT, intercept_B=self.intercept_B[rows])

    def nothing(self) -> Lessons:
        """A row that counts for nothing, for a rank that has no other."""
        batch, zero_BT = self.batch.nothing(), torch.zeros(1, 1)
        return replace(self, batch=batch, reference_logprobs_BT=zero_BT, intercept_B=zero_BT[0])


class Replay:
    """The lessons of the last iterations, on the CPU.

    Args:
        options: How many are kept, and how they are drawn.
    """

    def __init__(self, options: Replaying) -> None:
        self.options = options
        self._kept: deque[Lessons] = deque(maxlen=options.iterations)

    def add(self, lessons: Lessons) -> None:
        """Keep these and forget the oldest, by number and by size."""
        if not self.options.iterations:
            return
        lean = replace(lessons.batch, rollouts=[], metrics=Measures(), rejected=None, accepted=None)
        self._kept.append(replace(lessons, batch=lean).to("cpu"))
        while sum(one.most_megabytes for one in self._kept) > self.options.megabytes:
            self._kept.popleft()

    def draw(self, groups: int, generator: torch.Generator, device: torch.device) -> Lessons | None:
        """Past lessons at random, the same on all ranks; None if there are none.

        Args:
            groups: How many to draw, on all ranks, where single groups are drawn.
            generator: Of the same state on all ranks.
            device: Where to.
        """
        if not self._kept:
            return None
        if self.options.draw == "iteration":
            return self._kept[int(torch.randint(len(self._kept), (), generator=generator))].to(device)
        return self._groups(groups, generator).to(device)

    def _groups(self, count: int, generator: torch.Generator) -> Lessons:
        """Different groups, each as likely as any other that is kept, numbered anew."""
        total = sum(one.groups for one in self._kept)
        chosen = torch.randperm(total, generator=generator)[:count]
        number = torch.full((total,), -1).index_put((chosen,), torch.arange(len(chosen)))
        parts, first = [], 0
        for one in self._kept:
            group_B = one.batch.group_B
            parts.append(one.part(torch.where(group_B >= 0, number[first + group_B.clamp(min=0)], -1)))
            first += one.groups
        mine = [part for part in parts if part is not None] or [self._kept[0].nothing()]
        return Lessons(
            batch=join([one.batch for one in mine], mine[0].batch),
            reference_logprobs_BT=padded_cat([one.reference_logprobs_BT for one in mine]),
            intercept_B=torch.cat([one.intercept_B for one in mine]),
            groups=len(chosen),
        )

    def state_dict(self) -> list[dict[str, Any]]:
        """Tensors and numbers only."""
        names = [f.name for f in fields(Batch) if f.name not in NOT_KEPT]
        return [
            {name: getattr(one, name) for name in COLUMNS} | {name: getattr(one.batch, name) for name in names}
            for one in self._kept
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take up saved lessons."""
        self._kept.clear()
        for saved in state:
            own = {name: saved[name] for name in COLUMNS}
            row = {name: value for name, value in saved.items() if name not in COLUMNS}
            self._kept.append(Lessons(batch=Batch(**row), **own))


def share(of_ranks: Sequence[list[dict[str, Any]]], rank: int, world: int) -> list[dict[str, Any]]:
    """A rank's share of the states that the ranks of a run saved, which may have been another number of ranks."""
    if len(of_ranks) == world:
        return of_ranks[rank]
    return [_rows(_joined(parts), rank, world) for parts in zip(*of_ranks, strict=True)]


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of all parts."""
    tensors = {name for name, value in parts[0].items() if isinstance(value, Tensor)}
    return parts[0] | {name: padded_cat([part[name] for part in parts]) for name in sorted(tensors)}


def _rows(whole: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """The groups of one rank; a row that counts for nothing, where it has none."""
    mine = (whole["group_B"] >= 0) & (whole["group_B"] % world == rank)
    if mine.any():
        return {name: value[mine] if isinstance(value, Tensor) else value for name, value in whole.items()}
    first = {name: value[:1] if isinstance(value, Tensor) else value for name, value in whole.items()}
    off = {name: first[name] & False for name in ("mask_BT", "valid_B") if name in first}
    return first | off | {"group_B": torch.full((1,), -1)}
