"""More prompts in work than a batch needs: what it is made of does not depend on speed, and no length is favoured."""

import heapq
import json
from collections import Counter
from concurrent.futures import Future
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prime_lightning.rollout import Completion, Finish, Prompt, Sampling, Verdict
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.sampling.loader import Collecting, RolloutSource, TrainingLoader

SAMPLES = 4


class Numbers:
    """Prompts that are their number, and a verdict that depends on nothing but the text."""

    source = "numbers"

    def prompt(self, draw, tokenizer):
        return Prompt(draw=draw, token_ids=(1,), text="", kind="exact", answer="")

    def wanted(self, draw):
        return True

    def learn(self, draw, outcomes):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def submit(self, prompt, text):
        done = Future()
        done.set_result(Verdict.of_score(float(crc32(text.encode()) % 3 == 0)))
        return done


class Clocked:
    """Groups finish when their longest sample does, on machines of the given speeds; a clock instead of a wait.

    Args:
        seeded: Samples depend on draw and version alone; otherwise on nothing.
        speeds: Of the places that groups are begun in, in turn.
        looks: Whether it looks for prompts that were added, as the protocol lets it not do.
    """

    def __init__(self, seeded=True, speeds=(1.0,), looks=True, seed=0):
        self.version, self.seeded, self.speeds, self.looks = 0, seeded, speeds, looks
        self.rng, self.begun, self.lengths, self.most = np.random.default_rng(seed), [], [], 0
        self.clock, self.context = 0.0, None

    def stream(self, prompts, sampling, finished=None):
        known, running = 0, []
        while True:
            for prompt in prompts[known:] if self.looks or not known else []:
                group = self._draw(prompt, sampling)
                ends = (
                    self.clock + max(len(one.token_ids) for one in group) / self.speeds[prompt.draw % len(self.speeds)]
                )
                heapq.heappush(running, (ends, prompt.draw, prompt, group))
                self.begun.append(prompt.draw)
            known, self.most = len(prompts), max(self.most, len(running))
            if not running:
                return
            self.clock, _, prompt, group = heapq.heappop(running)
            yield prompt, group

    def _draw(self, prompt, sampling):
        rng = np.random.default_rng([7, prompt.draw, self.version]) if self.seeded else self.rng
        lengths = np.clip(rng.geometric(1 / 100, sampling.samples), 1, 1000)
        self.lengths += lengths.tolist()
        return [
            Completion(
                text=f"{prompt.draw} {k} {self.version}", token_ids=[1] * n, logprobs=[0.0] * n, finish=Finish.STOP,
                versions=[self.version] * n,
            )
            for k, n in enumerate(lengths.tolist())
        ]  # fmt: skip


def loader(engine, groups=4, oversample=1.0, surplus="drop", low=0.2, high=0.8, rank=0, world=1):
    numbers = Numbers()
    collecting = Collecting(
        groups=groups, sampling=Sampling(samples=SAMPLES), accuracy_filter=AccuracyFilter(low=low, high=high),
        max_prompt_tokens=9, oversample=oversample, patience=100, surplus=surplus, max_age=int(surplus == "keep"),
    )  # fmt: skip
    source = RolloutSource(prompts=numbers, tokenizer=None, engine=engine, verifiers=numbers)
    return TrainingLoader(source, collecting, rank, world)


def batches(made, count):
    """Whom and what each batch has, with an update of the weights after each."""
    found = []
    for _ in range(count):
        found.append([(r.prompt.draw, r.completion.text, r.completion.versions[0]) for r in made.collect().rollouts])
        made.source.engine.version += 1
    return found


speeds = st.lists(st.floats(0.01, 100), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(speeds, st.sampled_from([1.0, 1.5, 4.0, "auto"]), st.booleans(), st.integers(1, 6))
def test_dropped_surplus_leaves_the_batches_of_no_surplus(speeds, oversample, looks, groups):
    """Whatever finishes first, and whether the engine looks for more prompts or not."""
    expected = batches(loader(Clocked(), groups), 5)
    assert batches(loader(Clocked(speeds=speeds, looks=looks), groups, oversample), 5) == expected
    assert all(version == i for i, batch in enumerate(expected) for _, _, version in batch)  # all on-policy


@settings(max_examples=40, deadline=None)
@given(speeds, st.sampled_from([1.0, 3.0, "auto"]), st.sampled_from(["drop", "keep"]), st.integers(1, 3))
def test_no_prompt_is_lost_or_decided_twice(speeds, oversample, surplus, world):
    decided = Counter()
    for rank in range(world):
        made = loader(Clocked(speeds=speeds), 3, oversample, surplus, rank=rank, world=world)
        filtered = made._filtered

        def seen(group, tally, filtered=filtered):
            decided[group[0].prompt.draw] += 1
            return filtered(group, tally)

        made._filtered = seen
        batches(made, 6)
        waiting = set(made.returned)
        mine = [draw for draw in decided if draw % world == rank]
        assert set(mine) | waiting == set(range(rank, rank + made.position * world, world))
        assert not set(mine) & waiting
    assert set(decided.values()) == {1}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.sampled_from([2.5, "auto"]), st.sampled_from(["drop", "keep"]))
def test_a_resumed_loader_goes_on_with_the_same_batches(after, oversample, surplus):
    one = loader(Clocked(speeds=(1, 9)), 3, oversample, surplus)
    batches(one, after)
    other = loader(Clocked(speeds=(5, 0.1, 2)), 3, oversample, surplus)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    other.source.engine.version = one.source.engine.version
    assert batches(one, 3) == batches(other, 3)


@pytest.mark.parametrize(("oversample", "surplus"), [(1.0, "drop"), (3.0, "drop"), (3.0, "keep"), ("auto", "keep")])
def test_what_is_trained_on_is_as_long_as_what_is_drawn(oversample, surplus):
    """Unseeded, so that a group that is begun again is another one; all groups are accepted, or length would not be
    the engine's. To keep what is finished and begin the rest again gave 94 instead of 100 tokens."""
    made = loader(Clocked(seeded=False), 8, oversample, surplus, low=0.0, high=1.0)
    trained = np.array([len(r.completion.token_ids) for _ in range(400) for r in made.collect().rollouts])
    error = trained.std() / len(trained) ** 0.5
    assert abs(trained.mean() - 99.99) < 3.5 * error  # a geometric distribution of mean 100, cut at 1,000
    assert error < 1.0


def test_a_rejected_group_is_replaced_before_the_slowest_ends():
    """The clock of five batches of which four prompts in ten are accepted: in rounds, filled up, and with surplus."""
    clocks = []
    for looks, oversample in ((False, 1.0), (True, 1.0), (True, "auto")):
        engine = Clocked(looks=looks)
        batches(loader(engine, 32, oversample, high=0.3), 5)
        clocks.append(engine.clock)
    print([round(clock) for clock in clocks])
    assert clocks[2] < 0.5 * clocks[0]
    assert clocks[1] < clocks[0]


def test_work_in_progress_is_what_is_asked_for():
    engine = Clocked()
    batches(loader(engine, 8, 2.0), 20)
    assert engine.most == 16


def test_an_engine_that_gives_nothing_is_an_error():
    class Silent(Clocked):
        def stream(self, prompts, sampling, finished=None):
            yield from ()

    with pytest.raises(RuntimeError, match="Expected groups of 4 prompts of the engine, got none"):
        loader(Silent()).collect()


def measured():
    """The numbers of docs/vllm.md: `PYTHONPATH=tests python tests/sampling/test_surplus.py`."""
    for looks, oversample in ((False, 1.0), (True, 1.0), (True, "auto")):
        made = loader(engine := Clocked(looks=looks), 32, oversample, high=0.3)
        batches(made, 10)
        decided = len(set(engine.begun)) - len(made.returned)
        yield f"{looks=} {oversample=}: clock {engine.clock:,.0f}, {1 - decided / len(engine.begun):.0%} begun in vain"
    for surplus in ("drop", "keep"):
        made = loader(engine := Clocked(seeded=False), 8, 2.0, surplus, low=0.0, high=1.0)
        trained = np.array([len(r.completion.token_ids) for _ in range(250) for r in made.collect().rollouts])
        error = trained.std() / len(trained) ** 0.5
        yield f"{surplus=}: trained on {trained.mean():.1f} +- {error:.1f} tokens of {np.mean(engine.lengths):.1f}"


if __name__ == "__main__":
    print("\n".join(measured()))
