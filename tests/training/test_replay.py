"""Replay: past lessons, drawn by a generator, saved and restored to the bit, shared by ranks."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import rollout

from prime_lightning.models.batch import Batch
from prime_lightning.training.options import Replaying
from prime_lightning.training.replay import Lessons, Replay, share

CPU = torch.device("cpu")


def batch(number):
    group = [rollout(number, [2] * number, [3] * (number + i), score) for i, score in enumerate((1.0, None, 0.25))]
    return Batch.of_groups([group], temperature=0.7)


def lessons(number, megabytes=0.0):
    reference_BT, intercept_B = torch.full((3, number + 2), -0.1 * number), torch.full((3,), float(number))
    given = {"reference_logprobs_BT": reference_BT, "intercept_B": intercept_B}
    return Lessons(batch=batch(number), **given, groups=1, most_megabytes=megabytes)


def filled(size, count, **options):
    replay = Replay(Replaying(iterations=size, **options))
    for number in range(1, count + 1):
        replay.add(lessons(number))
    return replay


def drawn_numbers(replay, times=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [replay.draw(1, generator, CPU) for _ in range(times)]
    return [int(one.batch.prompt_length_B[0]) for one in drawn]


@pytest.mark.parametrize("draw", ["iteration", "groups"])
def test_the_last_lessons_are_drawn_equally_often(draw):
    numbers = drawn_numbers(filled(size=3, count=5, draw=draw), times=600)
    assert set(numbers) == {3, 4, 5}
    assert all(150 < numbers.count(n) < 250 for n in (3, 4, 5))


def test_drawn_lessons_are_those_that_were_added_without_their_objects():
    got = filled(size=1, count=4).draw(1, torch.Generator(), CPU)
    assert got.batch.metrics.means() == {}
    for f in (f for f in fields(Batch) if f.name != "metrics"):
        expected = [] if f.name == "rollouts" else getattr(batch(4), f.name)
        value = getattr(got.batch, f.name)
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected, f.name
    assert torch.equal(got.reference_logprobs_BT, torch.full((3, 6), -0.4))
    assert got.intercept_B.tolist() == [4.0] * 3


def test_without_room_nothing_is_kept_and_no_random_number_is_used():
    for replay in (filled(size=0, count=3), Replay(Replaying(iterations=2))):
        generator = torch.Generator().manual_seed(0)
        state = generator.get_state()
        assert replay.draw(1, generator, CPU) is None
        assert torch.equal(generator.get_state(), state)


def test_the_oldest_go_when_there_are_too_many_megabytes():
    replay = Replay(Replaying(iterations=9, megabytes=1.0))
    for number in range(1, 6):
        replay.add(lessons(number, megabytes=0.4))
    assert set(drawn_numbers(replay)) == {4, 5}
    replay.add(lessons(6, megabytes=2.0))  # larger than all there is room for
    assert replay.state_dict() == []


def test_megabytes_are_those_of_the_tensors(tmp_path):
    """A file that holds nothing else is about as large."""
    one = filled(size=1, count=300)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    assert lessons(300).megabytes == pytest.approx((tmp_path / "state.pt").stat().st_size / 1e6, rel=0.25)


def test_its_state_survives_a_file_of_plain_values(tmp_path):
    replay = filled(size=3, count=5)
    torch.save(replay.state_dict(), tmp_path / "state.pt")
    restored = Replay(Replaying(iterations=4))
    restored.add(lessons(9))  # forgotten by the load
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert drawn_numbers(restored) == drawn_numbers(replay)
    a, b = (r.draw(1, torch.Generator().manual_seed(1), CPU) for r in (replay, restored))
    assert torch.equal(a.reference_logprobs_BT, b.reference_logprobs_BT)
    assert torch.equal(a.intercept_B, b.intercept_B)
    assert a.batch.temperature == b.batch.temperature == 0.7
    assert a.groups == b.groups == 1
    for f in (f for f in fields(Batch) if f.type == "Tensor"):
        assert torch.equal(getattr(a.batch, f.name), getattr(b.batch, f.name))
    restored.add(lessons(6))
    assert set(drawn_numbers(restored)) == {3, 4, 5, 6}


def test_a_smaller_replay_takes_the_newest_of_a_state():
    smaller = Replay(Replaying(iterations=1))
    smaller.load_state_dict(filled(size=3, count=5).state_dict())
    assert set(drawn_numbers(smaller, times=9)) == {5}


# ---- single groups, on several ranks


def groups_of(iteration, sizes):
    """One group a size; tokens, reference and intercept of a row say which iteration and group it is of."""
    made = []
    for number, size in enumerate(sizes):
        key = 100 * iteration + number + 1
        made.append([rollout(key, [key], [key] * (j + 1), score=float(j % 2)) for j in range(size)])
    return made


def kept_by(rank, world, history):
    replay = Replay(Replaying(iterations=len(history), draw="groups"))
    for iteration, sizes in enumerate(history):
        groups = groups_of(iteration, sizes)
        whole = Batch.of_groups(groups)
        rows = torch.tensor([n % world == rank for n in whole.group_B.tolist()]).nonzero().squeeze(-1)
        mine = whole.select(rows) if len(rows) else whole.nothing()
        key_B = mine.tokens_BL[:, 0].float() if len(rows) else torch.zeros(1)
        key_BT = key_B[:, None] * mine.mask_BT
        one = Lessons(batch=mine, reference_logprobs_BT=key_BT, intercept_B=key_B, groups=len(sizes))
        replay.add(one)
    return replay


histories = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4)


def rows_of(one):
    """number of the group -> its rows, those that count."""
    found = {}
    for i, number in enumerate(one.batch.group_B.tolist()):
        if number >= 0:
            length = int(one.batch.response_length_B[i])
            reference = one.reference_logprobs_BT[i, :length].tolist()
            row = int(one.batch.tokens_BL[i, 0]), length, float(one.intercept_B[i]), reference
            found.setdefault(number, []).append(row)
    return found


@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 3), st.integers(1, 12), st.integers(0, 99))
def test_groups_are_drawn_whole_without_repeats_and_whatever_the_ranks(history, world, count, seed):
    every = [(100 * t + n + 1, size) for t, sizes in enumerate(history) for n, size in enumerate(sizes)]
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    expected = {
        place: [(key, j + 1, float(key), [float(key)] * (j + 1)) for j in range(size)]
        for place, (key, size) in enumerate(every[i] for i in chosen)
    }
    found = {}
    for rank in range(world):
        drawn = kept_by(rank, world, history).draw(count, torch.Generator().manual_seed(seed), CPU)
        assert drawn.groups == len(expected)
        mine = rows_of(drawn)
        assert not mine.keys() & found.keys()
        found |= mine
    assert found == expected


def test_groups_can_be_drawn_after_another_number_of_ranks_took_over():
    history = [[2, 1, 3], [1, 2], [3, 3, 1, 1]]
    saved = [kept_by(rank, 2, history).state_dict() for rank in range(2)]
    draws = []
    for world in (1, 2, 3):
        found = {}
        for rank in range(world):
            replay = kept_by(0, 1, history)
            replay.load_state_dict(share(saved, rank, world))
            found |= rows_of(replay.draw(6, torch.Generator().manual_seed(3), CPU))
        draws.append(found)
    assert draws[0] == draws[1] == draws[2]
    assert len(draws[0]) == 6


def test_a_batch_does_not_travel_with_what_was_rejected_beside_it():
    kept = filled(size=1, count=0)
    kept.add(replace(lessons(2), batch=replace(batch(2), rejected=batch(3))))
    assert kept.draw(1, torch.Generator(), CPU).batch.rejected is None
