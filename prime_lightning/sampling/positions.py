"""Where a run stands in its prompts, as plain values: what ranks save, and what other ranks take up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from prime_lightning.rollout import Completion, Finish, Label, Prompt, Rollout, Verdict


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
