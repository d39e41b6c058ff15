"""What ranks have of a batch and of the prompts: groups dealt anew before an update, positions dealt anew on a resume.

Before an update all ranks get about the same number of tokens to compute. What a rank sampled and what it trains on are
then two things. The result is the same but for rounding: denominators, normalisers and minibatches are those of all
ranks together. Groups stay whole.

Where a run stands in its prompts is saved as plain values, which another number of ranks can take up.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from prime_lightning.engines.host_group import host_group, of_all_ranks
from prime_lightning.models.batch import Batch, join
from prime_lightning.rollout import Completion, Finish, Label, Prompt, Rollout, Verdict


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


def redistribute(of_ranks: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """A rank's share of the positions that the ranks of a run saved, which may have been another number of ranks.

    No prompt is lost or drawn twice: draws behind the furthest rank that others had not come to are queued. On another
    number of ranks the acceptance rate is measured anew.

    Example:
        >>> states = [{"start": 0, "position": n, "returned": [], "surplus": "[]"} for n in (1, 3)]
        >>> redistribute(states, rank=0, world=1)
        {'start': 6, 'position': 0, 'returned': [2, 4], 'surplus': '[]'}
    """
    if len(of_ranks) == world:
        return of_ranks[rank]
    start, furthest = of_ranks[0]["start"], max(state["position"] for state in of_ranks)
    queue = sorted(
        [draw for state in of_ranks for draw in state["returned"]]
        + [
            start + position * len(of_ranks) + number
            for number, state in enumerate(of_ranks)
            for position in range(state["position"], furthest)
        ]
    )
    surplus = [group for state in of_ranks for group in json.loads(state["surplus"])]
    return {
        "start": start + furthest * len(of_ranks),
        "position": 0,
        "returned": queue[rank::world],
        "surplus": json.dumps(surplus[rank::world]),
    }


def saved(rollout: Rollout) -> dict[str, Any]:
    """A rollout without its prompt, which its draw gives back."""
    completion, verdict = asdict(rollout.completion), asdict(rollout.verdict)
    return {"draw": rollout.prompt.draw, "completion": completion, "verdict": verdict}


def restored(row: dict[str, Any], prompt: Prompt) -> Rollout:
    """The rollout that was saved, of its prompt."""
    completion = {**row["completion"], "finish": Finish(row["completion"]["finish"])}
    verdict = {**row["verdict"], "label": Label(row["verdict"]["label"])}
    return Rollout(prompt=prompt, completion=Completion(**completion), verdict=Verdict(**verdict))
