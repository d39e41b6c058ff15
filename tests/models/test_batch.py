"""Batches from groups, and their cuts: every row once, budgets kept, groups whole."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import rollout

from prime_lightning.algorithms.measures import Measures
from prime_lightning.models.batch import Batch, pad
from prime_lightning.rollout import Finish

members = st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.25, 1.0, None]), st.sampled_from(list(Finish)))
shapes = st.lists(st.tuples(st.integers(1, 6), st.lists(members, min_size=1, max_size=5)), min_size=1, max_size=7)


def groups_of(shape):
    """Groups whose tokens are all different, so that a misplaced one shows."""
    numbers = iter(range(1, 10_000))
    return [
        [
            rollout(draw, prompt, [next(numbers) for _ in range(length)], score, finish=finish, version=draw)
            for length, score, finish in group
        ]
        for draw, (size, group) in enumerate(shape)
        for prompt in [[next(numbers) for _ in range(size)]]
    ]


@settings(max_examples=60, deadline=None)
@given(shapes, st.booleans())
def test_of_groups_says_of_each_token_what_its_rollout_says(shape, keep_truncated):
    groups = groups_of(shape)
    measures = Measures()
    batch = Batch.of_groups(groups, keep_truncated=keep_truncated, metrics=measures)
    rows = [(number, rollout) for number, group in enumerate(groups) for rollout in group]
    assert len(batch) == len(rows)
    assert batch.groups == len(groups)
    for i, (number, r) in enumerate(rows):
        prompt, response = list(r.prompt.token_ids), r.completion.token_ids
        valid = r.verdict.known and (keep_truncated or r.completion.finish is Finish.STOP)
        behind = [0] * (batch.tokens_BL.shape[1] - len(prompt) - len(response))
        assert batch.tokens_BL[i].tolist() == prompt + response + behind
        assert (batch.prompt_length_B[i], batch.response_length_B[i]) == (len(prompt), len(response))
        T = batch.mask_BT.shape[1]
        assert batch.mask_BT[i].tolist() == [valid and t < len(response) for t in range(T)]
        assert batch.behaviour_logprobs_BT[i].tolist() == r.completion.logprobs + [0.0] * (T - len(response))
        assert batch.version_BT[i].tolist() == r.completion.versions + [0] * (T - len(response))
        assert (batch.outcome_B[i], batch.valid_B[i]) == (r.verdict.score if r.verdict.known else 0.0, valid)
        assert batch.group_B[i] == number
    assert batch.rollouts == [r for _, r in rows]
    assert batch.metrics is measures


@settings(max_examples=30, deadline=None)
@given(shapes, st.none() | st.integers(0, 8))
def test_of_accepted_leaves_all_rows_and_counts_the_first_groups(shape, accepted):
    batch = replace(Batch.of_groups(groups_of(shape)), accepted=accepted)
    kept = batch.of_accepted()
    assert torch.equal(kept.tokens_BL, batch.tokens_BL)
    assert torch.equal(kept.outcome_B, batch.outcome_B)
    for i, number in enumerate(batch.group_B.tolist()):
        counts = accepted is None or number < accepted
        assert kept.valid_B[i] == (batch.valid_B[i] and counts)
        assert kept.mask_BT[i].tolist() == [bool(m) and counts for m in batch.mask_BT[i]]


def test_a_greedy_batch_is_scored_at_temperature_one():
    assert Batch.of_groups([[rollout()]], temperature=0.0).temperature == 1.0
    assert Batch.of_groups([[rollout()]], temperature=0.7).temperature == 0.7


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one group"):
        Batch.of_groups([])


@settings(max_examples=60, deadline=None)
@given(shapes, st.randoms(use_true_random=False))
def test_select_is_the_batch_of_the_selected_rollouts(shape, random):
    groups = groups_of(shape)
    batch = Batch.of_groups(groups)
    rows = random.sample(range(len(batch)), random.randint(1, len(batch)))
    picked = batch.select(torch.tensor(rows))
    expected = Batch.of_groups([[batch.rollouts[i]] for i in rows])
    for name in ("tokens_BL", "mask_BT", "outcome_B", "valid_B", "behaviour_logprobs_BT", "version_BT"):
        assert torch.equal(getattr(picked, name), getattr(expected, name)), name
    assert picked.group_B.tolist() == [batch.group_B[i] for i in rows]
    assert picked.rollouts == expected.rollouts
    assert picked.temperature == batch.temperature


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 7), st.integers(0, 99))
def test_minibatches_hold_every_row_once_and_groups_whole(shape, count, seed):
    batch = Batch.of_groups(groups_of(shape))
    generator = torch.Generator().manual_seed(seed)
    if batch.groups < count:
        with pytest.raises(ValueError, match=f"each of {count} minibatches, got {batch.groups} prompts"):
            batch.minibatches(count, generator)
        return
    parts = batch.minibatches(count, generator)
    assert len(parts) == count
    assert sorted(torch.cat(parts).tolist()) == list(range(len(batch)))
    numbers = [set(batch.group_B[rows].tolist()) for rows in parts]
    assert sum(map(len, numbers)) == batch.groups  # no group in two parts
    assert max(map(len, numbers)) - min(map(len, numbers)) <= 1
    again = batch.minibatches(count, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_minibatches_are_shuffled():
    batch = Batch.of_groups([[rollout(draw)] for draw in range(16)])
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat(batch.minibatches(4, generator)).tolist() for _ in range(2))
    assert list(range(16)) != first != second


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(1, 60), st.booleans(), st.randoms(use_true_random=False))
def test_microbatches_hold_every_row_once_within_the_budget(shape, budget, whole_groups, random):
    batch = Batch.of_groups(groups_of(shape))
    groups = random.sample(range(batch.groups), random.randint(1, batch.groups))
    rows = torch.isin(batch.group_B, torch.tensor(groups)).nonzero().squeeze(-1)
    parts = list(batch.microbatches(rows, budget, whole_groups=whole_groups))
    assert sorted(torch.cat(parts).tolist()) == rows.tolist()
    for part in parts:
        units = len(batch.group_B[part].unique()) if whole_groups else len(part)
        assert units == 1 or batch.select(part).tokens_BL.numel() <= budget
    if whole_groups:
        assert sum(len(batch.group_B[part].unique()) for part in parts) == len(groups)


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(1, 60), st.booleans(), st.randoms(use_true_random=False))
def test_microbatches_with_shared_prompts_count_a_prompt_once(shape, budget, whole_groups, random):
    batch = Batch.of_groups(groups_of(shape))
    rows = torch.tensor(random.sample(range(len(batch)), random.randint(1, len(batch))))
    parts = list(batch.microbatches(rows, budget, whole_groups=whole_groups, shared_prompts=True))
    assert sorted(torch.cat(parts).tolist()) == sorted(rows.tolist())

    def tokens(part):
        prompts = {batch.group_B[i].item(): batch.prompt_length_B[i].item() for i in part}
        return batch.response_length_B[part].sum() + sum(prompts.values())

    def units(part):
        return len(batch.group_B[part].unique()) if whole_groups else len(part)

    assert all(units(part) == 1 or tokens(part) <= budget for part in parts)
    met = [i for part in parts for i in dict.fromkeys(batch.group_B[part].tolist())]
    assert [i for i, _ in itertools.groupby(met)] == sorted(set(met))  # the responses of a prompt come together
    for part, after in itertools.pairwise(parts):  # nothing that would have fitted is left to the next one
        group = batch.group_B[after]
        first = after[group == group[0]] if whole_groups else after[:1]
        assert tokens(torch.cat([part, first])) > budget


def test_microbatches_bring_rows_of_similar_length_together():
    lengths = [1, 30, 1, 30]
    batch = Batch.of_groups([[rollout(i, [2], [3] * n)] for i, n in enumerate(lengths)])
    parts = [part.tolist() for part in batch.microbatches(torch.arange(4), 62)]
    assert parts == [[0, 2], [1, 3]]  # 2 x 2 and 2 x 31 tokens; in the order of the rows it would be 2 x 31 twice


@given(st.lists(st.lists(st.integers(-9, 9), max_size=5), min_size=1, max_size=5))
def test_pad_keeps_the_numbers_and_adds_zeros(rows):
    padded = pad(rows, torch.long)
    longest = max(map(len, rows))
    assert padded.tolist() == [row + [0] * (longest - len(row)) for row in rows]
