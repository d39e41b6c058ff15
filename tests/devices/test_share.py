"""What ranks saved is shared out anew on another number of ranks: no prompt lost, none drawn twice, no group split."""

import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.sampling import ranks
from prime_lightning.training import replay

counted = st.lists(st.integers(0, 9), min_size=1, max_size=4)


def state(start, position, returned=(), surplus=()):
    return {"start": start, "position": position, "returned": list(returned), "surplus": json.dumps(list(surplus))}


def taken(start, world, counts):
    """All draws that ranks which have come to these positions have taken."""
    return {start + p * world + rank for rank, count in enumerate(counts) for p in range(count)}


@given(counted, st.integers(1, 5), st.integers(0, 50), st.data())
def test_every_prompt_is_drawn_once_across_a_change_of_ranks(counts, world, start, data):
    old = taken(start, len(counts), counts)
    again = data.draw(st.sets(st.sampled_from(sorted(old)))) if old else set()  # drawn, not finished
    states = [
        state(start, count, [d for d in sorted(again) if (d - start) % len(counts) == rank])
        for rank, count in enumerate(counts)
    ]
    shares = [ranks.redistribute(states, rank, world) for rank in range(world)]
    queued = [draw for share in shares for draw in share["returned"]]
    if world == len(counts):
        assert shares == states
        return
    first = {share["start"] for share in shares}.pop()
    done = old - again
    assert sorted([*done, *queued, *range(start)]) == list(range(first))
    assert len(queued) == len(set(queued))
    lengths = [len(share["returned"]) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_surplus_and_replayed_groups_stay_whole(old, new, groups):
    surplus = [state(0, 0, (), [[f"{rank}/{i}", "member"] for i in range(groups)]) for rank in range(old)]
    shared = [json.loads(ranks.redistribute(surplus, rank, new)["surplus"]) for rank in range(new)]
    whole = [group for one in surplus for group in json.loads(one["surplus"])]
    assert sorted(group for share in shared for group in share) == sorted(whole)

    def kept(rank):
        """Two members a group; the batch of a later rank is wider."""
        number = torch.arange(groups).repeat_interleave(2) * old + rank
        tokens = number[:, None].expand(-1, rank + 1) + 1
        return {"group_B": number, "tokens_BL": tokens, "temperature": 1.0}

    shares = [replay.share([[kept(rank)] for rank in range(old)], rank, new) for rank in range(new)]
    numbers = torch.cat([one["group_B"] for [one] in shares]).tolist()
    assert sorted(n for n in numbers if n >= 0) == sorted(2 * list(range(groups * old)))
    for [one] in shares:
        assert one["temperature"] == 1.0
        assert all(
            n < 0 or set(row.tolist()) <= {0, int(n) + 1}
            for row, n in zip(one["tokens_BL"], one["group_B"], strict=True)
        )
