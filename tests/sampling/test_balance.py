"""Groups dealt to ranks by tokens: nothing lost, nothing twice, nothing split, nearly even, and the same result."""

import itertools

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_lightning.models.batch import Batch, join
from prime_lightning.sampling.ranks import assign, tokens_of_groups

costs_and_ranks = st.tuples(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 8))


def loads(costs, chosen, ranks):
    return [sum(c for c, r in zip(costs, chosen, strict=True) if r == rank) for rank in range(ranks)]


@given(costs_and_ranks)
def test_each_group_goes_to_one_rank(case):
    costs, ranks = case
    chosen = assign(costs, ranks)
    assert len(chosen) == len(costs)
    assert all(0 <= rank < ranks for rank in chosen)
    if len(costs) >= ranks:
        assert set(chosen) == set(range(ranks))
    assert chosen == assign(tuple(costs), ranks)


@given(costs_and_ranks)
def test_no_rank_is_ahead_by_more_than_one_group(case):
    """When the fullest rank took its last group it had the least of all, so it leads by at most that group."""
    costs, ranks = case
    sums = loads(costs, assign(costs, ranks), ranks)
    assert max(sums) - min(sums) <= max(costs)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(2, 3))
def test_grahams_bound_against_all_assignments(costs, ranks):
    best = min(max(loads(costs, every, ranks)) for every in itertools.product(range(ranks), repeat=len(costs)))
    assert max(loads(costs, assign(costs, ranks), ranks)) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def batch_of(*groups, rank=0, world=1):
    """Responses of the given lengths."""
    made = [
        [toys.rollout(draw=10 * rank + i, response=range(5, 5 + n), score=float(n % 2)) for n in group]
        for i, group in enumerate(groups)
    ]
    return Batch.of_groups(made, rank=rank, world=world)


def test_tokens_count_the_prompt_of_each_response():
    assert tokens_of_groups(batch_of((3, 4), (1, 1))) == {0: 3 + 4 + 2 * 2, 1: 1 + 1 + 2 * 2}


def test_joined_parts_are_the_batch_of_all_groups():
    """Cut into single groups and joined again, tensor for tensor."""
    whole = batch_of((3, 9), (2, 2), (7, 1))
    parts = [whole.select((whole.group_B == group).nonzero().squeeze(-1)) for group in range(3)]
    again = join(parts, whole)
    assert [r.completion for r in again.rollouts] == [r.completion for r in whole.rollouts]
    for name in ("tokens_BL", "mask_BT", "behaviour_logprobs_BT", "version_BT", "group_B", "outcome_B"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, warm_model):
    """Two processes: batches before and after they were balanced, and a run with and one without it."""
    import nodes_ranks

    folder = tmp_path_factory.mktemp("balance")
    nodes_ranks.finish(nodes_ranks.torchrun(folder, warm_model, "balance"), folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_ranks_exchange_whole_groups(scenes):
    before, after = [s["before"] for s in scenes], [s["after"] for s in scenes]
    assert after[0] | after[1] == before[0] | before[1]  # number -> draws, lengths, log-probs
    assert not after[0].keys() & after[1].keys()
    sums = [[sum(sum(rows["lengths"]) for rows in one.values()) for one in two] for two in (before, after)]
    assert abs(sums[1][0] - sums[1][1]) < abs(sums[0][0] - sums[0][1])


def test_rejected_groups_are_dealt_too_and_none_is_lost(scenes):
    for one in scenes:
        assert any(before for before, _ in one["rejected"])
        assert all(before == after for before, after in one["rejected"])


def test_a_rank_for_which_nothing_is_left_gets_a_row_that_counts_for_nothing():
    nothing = batch_of((3, 4)).nothing()
    assert (nothing.groups, nothing.numbers(), tokens_of_groups(nothing)) == (0, [], {})
    assert not nothing.valid_B.any()


def test_a_balanced_run_equals_the_other(scenes):
    assert scenes[0]["moved"] > 0
    for name, weight in scenes[0]["plain"].items():
        torch.testing.assert_close(scenes[0]["balanced"][name], weight, rtol=0, atol=1e-5)
