"""Figures of the health panel against plain loops, on any ragged batch, and over ranks."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import rollout

from prime_lightning import algorithms as alg
from prime_lightning.models.batch import Batch
from prime_lightning.training.panel import judge_responses, judge_rewards

numbers = st.floats(-100, 100, width=32)
triples = st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=0, max_size=9)
texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=4)


def columns(rows, *types):
    return [torch.tensor([row[i] for row in rows], dtype=kind) for i, kind in enumerate(types)]


def ragged(rows, dtype):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


def mask_of(rows):
    return ragged([[True] * len(row) for row in rows], torch.bool)


@settings(deadline=None, max_examples=50)
@given(triples)
def test_correlation_is_pearsons(rows):
    x_B, y_B, valid_B = columns(rows, torch.float32, torch.float32, torch.bool)
    got = float(alg.correlation(x_B, y_B, valid_B))
    pairs = [(float(x), float(y)) for x, y, ok in zip(x_B, y_B, valid_B, strict=True) if ok]
    n = len(pairs)
    mx, my = (sum(p[i] for p in pairs) / max(n, 1) for i in (0, 1))
    sxx, syy = sum((x - mx) ** 2 for x, _ in pairs), sum((y - my) ** 2 for _, y in pairs)
    sxy = sum((x - mx) * (y - my) for x, y in pairs)
    if math.isnan(got):
        assert n < 2 or min(sxx, syy) <= 1e-18
    else:
        assert got == pytest.approx(sxy / math.sqrt(sxx * syy), abs=1e-6)


def test_a_constant_has_no_correlation():
    everything = torch.ones(3).bool()
    for x_B in (torch.zeros(3), torch.full((3,), 0.1), torch.full((3,), 1e30)):
        assert math.isnan(alg.correlation(x_B, torch.tensor([0.0, 1.0, 0.0]), everything))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5))
def test_last_token_share_is_plain_counting(rows):
    reward_BT, mask_BT = (
        ragged([[t[i] for t in row] for row in rows], kind) for i, kind in ((0, torch.float), (1, torch.bool))
    )
    kept = [[abs(r) for r, ok in row if ok] for row in rows]
    last, total = alg.last_token_share(reward_BT, mask_BT)
    assert float(last) == pytest.approx(sum(row[-1] for row in kept if row), rel=1e-5)
    assert float(total) == pytest.approx(sum(map(sum, kept)), rel=1e-5)


@settings(deadline=None, max_examples=50)
@given(texts, st.integers(1, 5))
def test_repetition_counts_ngrams_that_came_before(rows, n):
    repeated = total = 0
    for row in rows:
        seen = Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1))
        repeated, total = repeated + seen.total() - len(seen), total + seen.total()
    assert [int(x) for x in alg.repetition(ragged(rows, torch.long), mask_of(rows), n)] == [repeated, total]


def test_repetition_skips_ngrams_with_a_token_outside_the_mask():
    tokens_BT = torch.tensor([[7, 7, 7, 7, 7]])
    mask_BT = torch.tensor([[True, True, False, True, True]])
    assert [int(x) for x in alg.repetition(tokens_BT, mask_BT, 2)] == [1, 2]
    with pytest.raises(ValueError, match="at least 1"):
        alg.repetition(tokens_BT, mask_BT, 0)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 3))
def test_advantage_share_is_what_the_process_reward_adds(seed, weight):
    generator = torch.Generator().manual_seed(seed)
    outcome_BT, process_BT = torch.randn(2, 3, 4, generator=generator).unbind()
    mask_BT = torch.rand(3, 4, generator=generator) < 0.7
    part, whole = alg.advantage_share(weight * process_BT, outcome_BT, mask_BT)
    process = sum(weight * abs(float(p)) for p in process_BT[mask_BT])
    outcome = sum(abs(float(o)) for o in outcome_BT[mask_BT])
    assert float(part) == pytest.approx(process, rel=1e-4, abs=1e-5)
    assert float(whole) == pytest.approx(process + outcome, rel=1e-4, abs=1e-5)


def made(group_ids):
    """A batch of groups of two with unknown verdicts among them, and raw rewards of its tokens."""
    rows, rewards = [], []
    for i in group_ids:
        draws = torch.Generator().manual_seed(i)
        for _ in range(2):
            length, score = int(torch.randint(1, 7, (), generator=draws)), int(torch.randint(0, 3, (), generator=draws))
            tokens = torch.randint(1, 4, (length,), generator=draws).tolist()
            rows.append(rollout(i, response=tokens, score=None if score == 2 else float(score), version=i % 3))
            rewards.append(torch.randn(length, generator=torch.Generator().manual_seed(97 * i + length)).tolist())
    batch = Batch.of_groups([rows[i : i + 2] for i in range(0, len(rows), 2)])
    return batch, torch.where(batch.mask_BT, ragged(rewards, torch.float32), 0.0)


def over_ranks(parts):
    """The panel's means as all ranks of a run would have them."""
    stacks = [[] for _ in parts]
    for stack, (batch, reward_BT) in zip(stacks, parts, strict=True):
        judge_rewards(reward_BT, batch, lambda thing, stack=stack: stack.append(thing) or [thing])
    every = [stack[0] for stack in stacks]
    ranks = [judge_rewards(reward_BT, batch, lambda thing: every) for batch, reward_BT in parts]
    for measures, (batch, _) in zip(ranks, parts, strict=True):
        measures.update(judge_responses(batch, 5))
    sent = []
    for measures in ranks[1:]:
        calls = []
        measures.means(lambda tensor, how, calls=calls: calls.append(tensor) or tensor)
        sent.append(calls)
    join, at = {"sum": torch.add, "max": torch.maximum}, iter(range(2))

    def all_reduce(tensor, how):
        i = next(at)
        for calls in sent:
            tensor = join[how](tensor, calls[i])
        return tensor

    return ranks[0].means(all_reduce)


@pytest.mark.parametrize("seed", range(3))
def test_two_ranks_see_what_one_sees(seed):
    ids = list(range(10 * seed, 10 * seed + 6))
    one = over_ranks([made(ids)])
    two = over_ranks([made(ids[0::2]), made(ids[1::2])])
    assert one.keys() == two.keys() >= {"prm/auc", "prm/length_correlation", "train/repetition"}
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
