"""Groups dealt to ranks anew before an update, so that all have about the same number of tokens to compute.

What a rank sampled and what it trains on are then two things. The result is the same but for rounding: denominators,
normalisers and minibatches are those of all ranks together. Groups stay whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from prime_lightning.engines.host_group import host_group, of_all_ranks
from prime_lightning.models.batch import Batch, join


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each group: the costliest first, each to the rank with the least so far.

    The fullest rank gets at most `4/3 - 1 / (3 * ranks)` times what it would under the best assignment (longest
    processing time first; Graham, SIAM J. Appl. Math. 17, 1969). With at least as many groups as ranks no rank is
    left without one. Ties go to the earlier group and the lower rank, so that all ranks come to the same result.

    Args:
        costs: Of each group, above 0; here its tokens.
        ranks: Number of ranks.

    Example:
        >>> assign([5, 9, 4, 3, 3], ranks=2)
        [1, 0, 1, 0, 1]
    """
    chosen = [0] * len(costs)
    loads = [(0.0, rank) for rank in range(ranks)]
    for group in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        chosen[group] = rank
        heapq.heapreplace(loads, (load + costs[group], rank))
    return chosen


def tokens_of_groups(batch: Batch) -> dict[int, int]:
    """Tokens of each group, prompts counted for each response, as they go through the model."""
    length_B = batch.prompt_length_B + batch.response_length_B
    return {group: int(length_B[batch.group_B == group].sum()) for group in batch.numbers()}


def balanced(batch: Batch) -> Batch:
    """This rank's share of the groups of all ranks, in the order of their numbers. A collective: all ranks call it.

    A rank for which none is left gets one row that counts for nothing.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    gathered = of_all_ranks(tokens_of_groups(batch))
    costs = dict(sorted((group, cost) for one in gathered for group, cost in one.items()))
    home = dict(zip(costs, assign(list(costs.values()), world), strict=True))
    here = [None if other == rank else _of(batch, home, other) for other in range(world)]
    parts = [part for part in (_of(batch, home, rank), *_exchanged(here, rank, world)) if part is not None]
    return _ordered(join(parts, batch)) if parts else batch.nothing()


def _exchanged(outgoing: list[Batch | None], rank: int, world: int) -> list[Batch | None]:
    """What the other ranks have for this one; each in turn deals out what it does not keep."""
    received: list[Batch | None] = []
    for source in range(world):
        got: list[Batch | None] = [None]
        dist.scatter_object_list(got, outgoing if source == rank else None, src=source, group=host_group())
        received += got
    return received


def _of(batch: Batch, home: dict[int, int], rank: int) -> Batch | None:
    """The rows whose group goes to a rank; what was measured stays."""
    rows = torch.tensor([home.get(group) == rank for group in batch.group_B.tolist()]).nonzero().squeeze(-1)
    return replace(batch.select(rows), metrics=type(batch.metrics)()) if len(rows) else None


def _ordered(batch: Batch) -> Batch:
    return batch.select(batch.group_B.argsort(stable=True))
