"""The data side: refill, filter, patience, long prompts, unknown verdicts, overlap of ranks."""

import json
import math
from collections import Counter
from contextlib import nullcontext

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from toys import write_jsonl

from prime_lightning.prompts.dataset import DatasetPrompts, MixedPrompts, Prompts, Template
from prime_lightning.rollout import Completion, Finish, Prompt, Rollout, Sampling, Verdict
from prime_lightning.sampling.acceptance import AccuracyFilter, Tally
from prime_lightning.sampling.validation import EvaluationLoader

ONE = Sampling(samples=1, max_tokens=8)


def group(*scores, truncated=()):
    """Rollouts of one prompt; None is an unknown verdict."""
    prompt = Prompt(draw=0, token_ids=(1,), text="p", kind="exact", answer="1", source="s")
    return [
        Rollout(
            prompt=prompt,
            completion=Completion(
                text="c",
                token_ids=[1],
                logprobs=[0.0],
                finish=Finish.LENGTH if i in truncated else Finish.STOP,
                versions=[0],
            ),
            verdict=Verdict.unknown("x") if score is None else Verdict.of_score(score),
        )
        for i, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("rollouts", "options", "reason"),
    [
        (group(1, 0, 0, 0), {}, None),
        (group(1, 1, 1, 0), {}, None),
        (group(1, 1, 1, 1), {}, "too_easy"),
        (group(0, 0, 0, 0), {}, "too_hard"),
        (group(0.5, 0.25, 0.5, 0.25), {}, None),  # code: shares of tests passed
        (group(1, None, None, None), {}, "few_valid"),
        (group(1, 0, None, None), {}, None),  # unknown members count neither way
        (group(1, 0, 0, 0, truncated={3}), {"truncated": "reject"}, "truncated"),
        (group(1, 1, 0, 0, truncated={2, 3}), {"truncated": "mask"}, "too_easy"),
        (group(1, 1, 0, 0, truncated={2, 3}), {"truncated": "keep"}, None),
        (group(0, 0), {"low": 0.0}, None),
    ],
)
def test_what_the_filter_rejects(rollouts, options, reason):
    assert AccuracyFilter(**options).reject(rollouts) == reason


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16), st.floats(0, 1), st.floats(0, 1))
def test_the_filter_is_the_papers_inequality(scores, a, b):
    low, high = sorted((a, b))
    accepted = AccuracyFilter(low=low, high=high).reject(group(*scores)) is None
    assert accepted == (low <= sum(scores) / len(scores) <= high)


@pytest.fixture
def module(warm_model):
    data = tiny.data(warm_model, accuracy_filter=AccuracyFilter(low=0.1, high=0.9), patience=1000)
    data.setup("fit")
    yield data
    data.close()


def loader(data, rank=0, world=1):
    return data.training_loader(rank, world)


def test_batches_are_full_whole_and_in_order(module):
    stream = loader(module)
    seen = []
    for _, batch in zip(range(3), stream, strict=False):
        assert batch.groups == 4
        assert len(batch) == 16
        assert all(0 < batch.outcome_B[batch.group_B == g].mean() < 1 for g in range(4))
        draws = [r.prompt.draw for r in batch.rollouts[::4]]
        assert draws == sorted(draws)
        assert batch.metrics.means()["rollout/groups"] >= 4
        assert batch.metrics.means()["rollout/acceptance"] == pytest.approx(4 / batch.metrics.means()["rollout/groups"])
        seen += draws
    assert seen == sorted(set(seen))


def test_a_round_is_no_larger_than_what_is_missing(module):
    """Without oversampling no accepted group is left over, so that nothing waits and turns stale."""
    stream = loader(module)
    for _ in range(3):
        stream.collect()
        assert stream.surplus == []


def test_a_batch_does_not_depend_on_the_order_of_finishing(module):
    forwards = loader(module).collect()
    module.engine = tiny.Backwards(batch_size=32)
    module.engine.start(module.model)
    backwards = loader(module).collect()
    assert [r.completion.token_ids for r in forwards.rollouts] == [r.completion.token_ids for r in backwards.rollouts]


@pytest.fixture
def oversampling(module):
    """Groups finish backwards, so that all of a round are whole before the first is decided."""
    module.oversample, module.surplus, module.engine = 6.0, "keep", tiny.Backwards(batch_size=32)
    module.engine.start(module.model)
    return module


def test_state_goes_on_with_queue_and_surplus(oversampling):
    first, second = loader(oversampling), loader(oversampling)
    first.collect()
    assert first.surplus
    second.load_state_dict(first.state_dict())
    ours, theirs = first.collect(), second.collect()
    assert [r.completion for r in ours.rollouts] == [r.completion for r in theirs.rollouts]
    assert [r.prompt for r in ours.rollouts] == [r.prompt for r in theirs.rollouts]


def test_surplus_is_trained_on_and_not_sampled_again(oversampling):
    sampled = []

    class Watched(tiny.Backwards):
        def stream(self, prompts, sampling, finished=None):
            sampled.extend(prompt.draw for prompt in prompts)
            yield from super().stream(prompts, sampling, finished)

    oversampling.engine = Watched(batch_size=32)
    oversampling.engine.start(oversampling.model)
    stream = loader(oversampling)
    used = [r.prompt.draw for _ in range(4) for r in stream.collect().rollouts[::4]]
    assert len(sampled) == len(set(sampled))  # every group was whole, so none was begun twice
    assert used == sorted(set(used))


def test_prompts_cut_short_go_to_the_front_of_the_queue(module):
    """The hf engine finishes groups in order, so that a full batch cuts the rest of its round short."""
    stream = loader(module)
    expected = [stream.collect() for _ in range(4)]
    module.oversample = 6.0
    stream = loader(module)
    got = [stream.collect() for _ in range(4)]
    assert stream.returned
    for a, b in zip(expected, got, strict=True):  # the weights stay the same here, and so do the batches
        assert [r.prompt.draw for r in a.rollouts] == [r.prompt.draw for r in b.rollouts]
        assert [r.completion.token_ids for r in a.rollouts] == [r.completion.token_ids for r in b.rollouts]


def test_surplus_that_is_too_old_is_dropped_and_counted(oversampling):
    stream = loader(oversampling)
    stream.collect()
    surplus = len(stream.surplus)
    assert surplus > 0
    oversampling.engine.version += 2  # two iterations later
    batch = stream.collect()
    assert batch.metrics.means()["rollout/stale_groups"] == surplus
    assert int(batch.version_BT[batch.mask_BT].min()) == oversampling.engine.version


def test_ranks_share_the_prompts_without_overlap(module):
    draws = [[p.draw for p in loader(module, rank, 2).take(5, Tally())] for rank in (0, 1)]
    assert draws == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


def test_prompts_that_ranks_cannot_share_are_refused(module):
    with pytest.raises(ValueError, match="divisible by the number of ranks, got 4 prompts on 3 ranks"):
        loader(module, 0, 3)


def test_patience_warns_and_then_stops(module):
    module.accuracy_filter = AccuracyFilter(low=0.5, high=0.5, min_valid=100)
    module.patience = 4
    with (
        pytest.warns(UserWarning, match="accepted 0 of 9 groups of this batch, which needs 4"),
        pytest.raises(
            ValueError, match=r"accepted 0 of 17 groups.*few_valid 17.*stops here because of `data.patience` 4"
        ),
    ):
        loader(module).collect()


def test_long_prompts_are_skipped_and_counted(module, monkeypatch):
    module.max_prompt_tokens = 6
    tally = Tally()
    monkeypatch.setattr("prime_lightning.sampling.loader.LONG_PROMPTS_IN_A_ROW", 50)
    with pytest.raises(ValueError, match="Expected prompts of at most 6 tokens, got 50 longer ones"):
        loader(module).take(1, tally)
    assert tally.metrics["rollout/long_prompts"] == 50


def test_unknown_verdicts_are_masked_and_counted(module):
    class Flaky(type(module.verifiers)):
        def submit(self, prompt, text):
            future = super().submit(prompt, text)
            self.n = getattr(self, "n", 0) + 1
            if self.n % 4 == 0:
                future = type(future)()
                future.set_result(Verdict.unknown("the worker died"))
            return future

    module.verifiers = Flaky()
    batch = loader(module).collect()
    assert batch.metrics.means()["rollout/unknown"] == 0.25
    assert not batch.valid_B[3::4].any()
    assert not batch.mask_BT[3::4].any()
    assert batch.valid_B.sum() == 12


def test_evaluation_takes_each_prompt_once_over_ranks(module):
    source = module.source(module.train)
    greedy = Sampling(samples=2, max_tokens=8, temperature=0.0)
    parts = [EvaluationLoader(source, greedy, 10, 4, rank, 2) for rank in (0, 1)]
    draws = [[r.prompt.draw for batch in part for r in batch.rollouts[::2]] for part in parts]
    assert sorted(draws[0] + draws[1]) == list(range(10))
    assert [len(part) for part in parts] == [2, 2]


def validated(model, count):
    prompts = tiny.ArithmeticPrompts(seed=9, operations=2)
    return tiny.data(model, validation=prompts, validation_prompts=count, validation_sampling=ONE)


def test_validation_is_the_mean_outcome(warm_model, tmp_path):
    data = validated(warm_model, 64)
    trainer = tiny.trainer(tmp_path, 1)
    (result,) = trainer.validate(tiny.module(warm_model), data, verbose=False)
    data.setup("fit")
    prompts = [data.validation.prompt(i, data.tokenizer) for i in range(64)]
    answers = {p.draw: c[0].text for p, c in data.engine.stream(prompts, data.validation_sampling)}
    right = [answers[p.draw].rpartition("#")[2] == p.answer for p in prompts]
    assert result["val/pass1"] == pytest.approx(sum(right) / 64)
    assert not math.isnan(result["val/length"])


def test_predict_gives_rewards_of_each_token(warm_model, tmp_path):
    data = validated(warm_model, 4)
    prime = tiny.module(warm_model, reference=str(warm_model))
    (out,) = tiny.trainer(tmp_path, 1).predict(prime, data)
    assert out["process_BT"].shape == out["batch"].mask_BT.shape
    assert float(out["process_BT"].abs().max()) < 1e-6  # the PRM still is the reference


def rows_file(tmp_path, *answers):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": str(i), "answer": a}) + "\n" for i, a in enumerate(answers)))
    return str(path)


def test_unusable_references_are_reported_and_dropped(warm_model, tmp_path):
    plain = Template(user="{problem}", chat=False)
    path = rows_file(tmp_path, "1", "2", r"\frac{1}{", "4")
    train = MixedPrompts([tiny.ArithmeticPrompts(), DatasetPrompts(path, source="mine", template=plain)])
    data = tiny.data(warm_model, train=train)
    with pytest.warns(UserWarning, match=r"1 of 4 references cannot be used.*mine row 2"):
        data.setup("fit")
    assert sorted(row["answer"] for row in train.parts()[1].rows) == ["1", "2", "4"]
    data.close()
    broken = tiny.data(warm_model, train=DatasetPrompts(rows_file(tmp_path, r"\frac{"), template=plain))
    with (
        pytest.warns(UserWarning, match="1 of 1 references"),
        pytest.raises(ValueError, match="Expected usable reference answers in 'rows', got none"),
    ):
        broken.setup("fit")
    broken.close()


def test_many_unknown_verdicts_raise_an_alarm(module):
    class Failing(type(module.verifiers)):
        def submit(self, prompt, text):
            graded = super().submit(prompt, text)
            self.n = getattr(self, "n", 0) + 1
            if self.n == 3:
                graded = type(graded)()
                graded.set_result(Verdict.unknown("no worker"))
            return graded

    module.verifiers = Failing()
    with pytest.warns(UserWarning, match=r"More than 1% of verdicts are unknown \(.*the verifier failed 1 times"):
        loader(module).collect()


@pytest.mark.parametrize(("rows", "asked", "each"), [(3, 8, 2), (3, 9, 3), (9, 8, 1)])
def test_validation_asks_each_row_equally_often(warm_model, tmp_path, rows, asked, each):
    chains = tiny.ArithmeticPrompts(seed=1, operations=2)
    path = write_jsonl(tmp_path / "rows.jsonl", [dict(chains.row(i)) for i in range(rows)])
    few = DatasetPrompts(path, kind="exact", template=Template(user="{problem}", chat=False))
    data = tiny.data(
        warm_model, validation=few, validation_prompts=asked, validation_sampling=Sampling(samples=1, max_tokens=8)
    )
    drawn, stream = Counter(), data.engine.stream

    def seen(prompts, *rest):
        drawn.update(prompt.text for prompt in prompts)
        yield from stream(prompts, *rest)

    data.engine.stream = seen
    words = pytest.warns(UserWarning, match=r"asks 6 prompts instead of 8 .*each of the 3 rows of 'rows' 2 times")
    uneven = words if asked == 8 and rows == 3 else nullcontext()
    with uneven:
        tiny.trainer(tmp_path, 1).validate(tiny.module(warm_model), data, verbose=False)
    assert set(drawn.values()) == {each}
    assert len(drawn) == min(rows, asked)


class OwnPrompts(Prompts):
    """Of ids, without a template."""

    source, kind = "own", "exact"

    def row(self, draw):
        return {}

    def prompt(self, draw, tokenizer):
        return Prompt(draw=draw, token_ids=(1,), text="", kind=self.kind)


def test_prompts_of_ones_own_need_no_template():
    own = OwnPrompts()
    assert tiny.data("none", train=own, validation=own).train is own
