"""Replay: the last batches, drawn by a generator, saved and restored to the bit."""

from dataclasses import fields

import torch
from toys import rollout

from prime_lightning.batch import Batch
from prime_lightning.replay import Replay

CPU = torch.device("cpu")


def batch(number):
    group = [rollout(number, [2] * number, [3] * (number + i), score) for i, score in enumerate((1.0, None, 0.25))]
    return Batch.of_groups([group], temperature=0.7)


def filled(size, count):
    replay = Replay(size)
    for number in range(1, count + 1):
        replay.add(batch(number), torch.full((3, number + 2), -0.1 * number))
    return replay


def drawn_numbers(replay, times=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [int(b.prompt_length_B[0]) for _ in range(times) for b, _ in replay.draw(generator, CPU)]


def test_the_last_batches_are_drawn_equally_often():
    numbers = drawn_numbers(filled(size=3, count=5), times=600)
    assert set(numbers) == {3, 4, 5}
    assert all(150 < numbers.count(n) < 250 for n in (3, 4, 5))


def test_a_drawn_batch_is_the_one_that_was_added_without_its_objects():
    [(got, reference_BT)] = filled(size=1, count=4).draw(torch.Generator(), CPU)
    assert got.metrics.means() == {}
    for f in (f for f in fields(Batch) if f.name != "metrics"):
        expected = [] if f.name == "rollouts" else getattr(batch(4), f.name)
        value = getattr(got, f.name)
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected, f.name
    assert torch.equal(reference_BT, torch.full((3, 6), -0.4))


def test_without_room_nothing_is_kept_and_no_random_number_is_used():
    for replay in (filled(size=0, count=3), Replay(2)):
        generator = torch.Generator().manual_seed(0)
        state = generator.get_state()
        assert replay.draw(generator, CPU) == []
        assert torch.equal(generator.get_state(), state)


def test_its_state_survives_a_file_of_plain_values(tmp_path):
    replay = filled(size=3, count=5)
    torch.save(replay.state_dict(), tmp_path / "state.pt")
    restored = Replay(4)
    restored.add(batch(9), torch.zeros(3, 11))  # forgotten by the load
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert drawn_numbers(restored) == drawn_numbers(replay)
    for one, other in ((replay, restored), (restored, replay)):
        [(a, a_BT)], [(b, b_BT)] = (r.draw(torch.Generator().manual_seed(1), CPU) for r in (one, other))
        assert torch.equal(a_BT, b_BT)
        assert a.temperature == b.temperature == 0.7
        assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch) if f.type == "Tensor")
    restored.add(batch(6), torch.zeros(3, 8))
    assert set(drawn_numbers(restored)) == {3, 4, 5, 6}


def test_a_smaller_replay_takes_the_newest_of_a_state():
    smaller = Replay(1)
    smaller.load_state_dict(filled(size=3, count=5).state_dict())
    assert set(drawn_numbers(smaller, times=9)) == {5}
