"""The warm start: lessons in order, what is learned from them, and resuming."""

import json
import math

import lightning.pytorch as pl
import pytest
import tiny
import torch
from torch.testing import assert_close
from toys import write_jsonl

from prime_lightning.models.options import Loading
from prime_lightning.prompts.arithmetic import ArithmeticLessons, build_tokenizer
from prime_lightning.prompts.dataset import Template
from prime_lightning.training.sft import DatasetLessons, LessonDataModule, LessonLoader, SFTModule


def lessons(folder, size=22, batch_size=4, **options):
    """Five batches an epoch; two lessons are left over."""
    data = LessonDataModule(folder, ArithmeticLessons(size=size, operations=2), batch_size=batch_size, **options)
    data.setup("fit")
    return data


def texts(data, batch):
    tokens_BL, prompt_length_B, response_length_B = batch
    ends = (prompt_length_B + response_length_B).tolist()
    return [data.tokenizer.decode(row[:end].tolist()) for row, end in zip(tokens_BL, ends, strict=True)]


def all_texts(data, loader):
    return [texts(data, batch) for batch in loader]


def test_collate_lays_out_prompt_response_and_end(model_folder):
    data = lessons(model_folder)
    rows = [data.lessons[i] for i in range(4)]
    tokens_BL, prompt_length_B, response_length_B = data.collate([*rows, {"problem": "^1=", "response": "2"}])
    tokenizer = build_tokenizer()
    for i, row in enumerate([*rows, {"problem": "^1=", "response": "2"}]):
        prompt, response = (tokenizer(row[name])["input_ids"] for name in ("problem", "response"))
        expected = [*prompt, *response, tokenizer.eos_token_id]
        assert tokens_BL[i].tolist() == expected + [0] * (tokens_BL.shape[1] - len(expected))
        assert (prompt_length_B[i], response_length_B[i]) == (len(prompt), len(response) + 1)


@pytest.mark.parametrize("packed", [False, True])
def test_long_lessons_are_cut_and_one_without_room_teaches_nothing(model_folder, packed):
    data = lessons(model_folder, max_tokens=8)
    whole, cut = {"problem": "^1+1=", "response": "2;"}, {"problem": "^1+2+3=", "response": "3;6;#6"}
    full, over = {"problem": "^1+2+3+=", "response": "6"}, {"problem": "^1+2+3+4=", "response": "3;6;0;#0"}
    tokens_BL, prompt_length_B, response_length_B = data.collate([whole, cut, full, over])
    assert tokens_BL.shape == (4, 8)
    assert prompt_length_B.tolist() == [5, 7, 8, 8]
    assert response_length_B.tolist() == [3, 1, 0, 0]
    module = started(model_folder, loading=Loading(packed=packed))
    nothing = data.collate([full, over])
    assert module.training_step(nothing, 0) == 0  # and not 0 / 0
    mean = module.training_step((tokens_BL, prompt_length_B, response_length_B), 0)
    assert_close(mean, module.training_step(data.collate([whole, cut]), 0))


def test_each_epoch_is_another_order_of_whole_batches(model_folder):
    data = lessons(model_folder)
    epochs = [all_texts(data, LessonLoader(data, 0, 1, lambda done=5 * i: done)) for i in range(4)]
    everything = sorted(row["problem"] + row["response"] + "<eos>" for row in data.lessons)
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4] * 5 == [4] * len(LessonLoader(data, 0, 1))
        seen = [text for batch in epoch for text in batch]
        assert len(set(seen)) == 20
        assert set(seen) <= set(everything)
    assert len({str(epoch) for epoch in epochs}) == 4
    assert epochs[1] == all_texts(data, LessonLoader(data, 0, 1, lambda: 5))
    other = lessons(model_folder, seed=7)
    assert all_texts(other, LessonLoader(other, 0, 1)) != epochs[0]


def test_ranks_share_each_batch(model_folder):
    data = lessons(model_folder)
    whole = all_texts(data, LessonLoader(data, 0, 1))
    first, second = (all_texts(data, LessonLoader(data, rank, 2)) for rank in (0, 1))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(batch) for batch in whole]
    assert {len(batch) for batch in first + second} == {2}


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 7, 10])
def test_a_loader_goes_on_behind_the_batches_that_were_trained_on(model_folder, taken):
    data = lessons(model_folder)
    expected = [batch for i in range(4) for batch in all_texts(data, LessonLoader(data, 0, 1, lambda done=5 * i: done))]
    found = all_texts(data, LessonLoader(data, 0, 1, lambda: taken))
    assert found == expected[taken : taken + 5 - taken % 5]


def started(folder, **options):
    """A module outside of a trainer."""
    module = SFTModule(folder, **options)
    module.configure_model()
    module.log = lambda *args, **kwargs: None  # there is no trainer to log to
    return module


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_the_mean_over_response_tokens(sharp_folder, packed):
    data = lessons(sharp_folder)
    module = started(sharp_folder, loading=Loading(packed=packed, chunk_tokens=5))
    for batch in LessonLoader(data, 0, 1):
        losses = []
        for tokens, start, length in zip(*batch, strict=True):
            logits_LV = module.policy.model(tokens[None, : start + length]).logits[0]
            targets = tokens[start : start + length]
            losses.append(torch.nn.functional.cross_entropy(logits_LV[start - 1 : -1], targets, reduction="none"))
        assert_close(module.training_step(batch, 0), torch.cat(losses).mean(), rtol=1e-4, atol=1e-4)


class Record(pl.Callback):
    """Loss, learning rate and lessons of each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append((float(outputs["loss"]), rate, texts(trainer.datamodule, batch)))


def fit(folder, model, steps=-1, resume=None, size=22, **options):
    """Train; returns the record, the weights and a checkpoint of the end."""
    record = Record()
    trainer = tiny.trainer(folder, steps, callbacks=[record], **options)
    module = SFTModule(model, optimizer=tiny.adam(1e-2))
    trainer.fit(module, lessons(model, size=size), ckpt_path=resume)
    path = folder / f"{trainer.global_step}.ckpt"
    trainer.save_checkpoint(path)
    return record.rows, module.state_dict(), path


def test_training_goes_through_all_epochs_and_learns(tmp_path, model_folder):
    rows, _, _ = fit(tmp_path, model_folder, max_epochs=6)
    assert len(rows) == 6 * 5
    epochs = [[text for _, _, batch in rows[i : i + 5] for text in batch] for i in range(0, 30, 5)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 6
    assert sum(loss for loss, _, _ in rows[-5:]) < 0.6 * sum(loss for loss, _, _ in rows[:5])


def test_the_rate_rises_for_a_tenth_and_falls_as_a_cosine(tmp_path, model_folder):
    rows, _, _ = fit(tmp_path, model_folder, max_epochs=4)
    expected = [step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 18)) / 2 for step in range(1, 21)]
    assert [rate / 1e-2 for _, rate, _ in rows] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, model_folder, stop):
    straight, weights, _ = fit(tmp_path, model_folder, steps=12, max_epochs=4)

    # The same schedule, stopped on the way: in an epoch, at its end, and in the next one.
    class Stop(Record):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")
                trainer.should_stop = True

    first = Stop()
    trainer = tiny.trainer(tmp_path, 12, callbacks=[first], max_epochs=4)
    trainer.fit(SFTModule(model_folder, optimizer=tiny.adam(1e-2)), lessons(model_folder))
    rest, resumed, _ = fit(tmp_path, model_folder, steps=12, max_epochs=4, resume=tmp_path / "stop.ckpt")
    assert first.rows + rest == straight
    assert all(torch.equal(w, resumed[name]) for name, w in weights.items())


def test_too_few_lessons_for_a_batch_are_refused(model_folder):
    with pytest.raises(ValueError, match="one batch of 4 lessons, got 3"):
        lessons(model_folder, size=3)


def test_lessons_from_a_file(tmp_path, model_folder):
    rows = [{"asked": f"^{i}+1=", "solution": f"{i + 1};#{i + 1}"} for i in range(4)]
    path = write_jsonl(tmp_path / "lessons.jsonl", rows)
    template = Template(user="{problem}", chat=False)
    made = DatasetLessons(path, columns={"problem": "asked", "response": "solution"}, template=template)
    assert [made[i]["response"] for i in range(len(made))] == [row["solution"] for row in rows]
    data = LessonDataModule(model_folder, made, batch_size=4)
    data.setup("fit")
    assert sorted(texts(data, data.collate([made[i] for i in range(4)])))[0] == "^0+1=1;#1<eos>"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "Expected rows in"),
        ([{"problem": "1"}], r"field 'response' in .*, got \['problem'\]. Set `columns`"),
        ([{"problem": "1", "response": "2"}, {"problem": "3", "response": None}], r"in 1 of 2 \(rows \[1\]"),
    ],
)
def test_lessons_that_cannot_work_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        DatasetLessons(write_jsonl(tmp_path / "lessons.jsonl", rows))


# ---- rows of messages ------------------------------------------------------------------------------------------------

ASKED = [{"role": "system", "content": "-"}, {"role": "user", "content": "1+1="}]
TALK = [*ASKED, {"role": "assistant", "content": "2"}]
SHAREGPT = [{"from": "system", "value": "-"}, {"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": TALK}, "messages"),
        ({"conversations": SHAREGPT}, "conversations"),
        ({"messages": json.dumps(TALK)}, "messages"),
        ({"prompt": ASKED, "completion": TALK[-1:]}, "completion"),
        ({"prompt": ASKED, "response": "2"}, "response"),
    ],
)
def test_the_last_answer_of_messages_is_the_response_and_the_rest_the_prompt(tmp_path, model_folder, row, field):
    lessons = DatasetLessons(write_jsonl(tmp_path / "rows.jsonl", [row]), columns={"response": field})
    assert lessons[0]["response"] == "2"
    assert lessons.template.messages(lessons[0]) == ASKED


def test_messages_without_an_answer_are_named(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}, {"messages": ASKED}])
    with pytest.raises(ValueError, match=r"an answer at the end of `messages` .* none in 1 of 2 \(rows \[1\]"):
        DatasetLessons(path, columns={"response": "messages"})
