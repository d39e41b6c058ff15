"""Data sets in streaming mode: any row by its number, blocks in a seeded order, and a run that resumes exactly."""

import lightning.pytorch as pl
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import write_jsonl

from prime_lightning.prompts import streaming
from prime_lightning.prompts.dataset import Template
from prime_lightning.prompts.rows import stream_rows
from prime_lightning.prompts.streaming import Stream, StreamedPrompts

PLAIN = Template(user="{problem}", chat=False)
ROWS = [{"problem": f"^{i % 10}+{i // 10 % 10}=", "answer": str(i % 10 + i // 10 % 10), "i": i} for i in range(37)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two files, of which the second has the rest of the rows."""
    folder = tmp_path_factory.mktemp("rows")
    return [str(write_jsonl(folder / f"{n}.jsonl", part)) for n, part in enumerate((ROWS[:20], ROWS[20:]))]


def opened(path, keep=4):
    return Stream(stream_rows(path, split="train", name=None, revision=None), keep)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 120), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 5))
def test_any_row_in_any_order_and_after_a_restart(path, asked, every, stop):
    """Notes every few rows, a memory of four: most of these are behind it, and in later passes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(streaming, "NOTE_EVERY", every)
        stream = opened(path)
        for n, index in enumerate(asked):
            assert stream[index]["i"] == index % len(ROWS)
            if n == stop:
                state = stream.state_dict()
                stream = opened(path)
                stream.load_state_dict(state)


def test_a_restart_reads_from_the_last_note_on(path, monkeypatch):
    monkeypatch.setattr(streaming, "NOTE_EVERY", 8)
    stream = opened(path)
    assert stream[30]["i"] == 30
    again = opened(path)
    again.load_state_dict(stream.state_dict())
    assert again._next == 24  # no row before is read
    assert again[30]["i"] == 30
    assert again[0]["i"] == 0  # as a probe asks
    monkeypatch.setattr(Stream, "_again", None)
    assert again[25]["i"] == 25


def test_blocks_are_permuted_and_no_row_is_lost(path):
    prompts = StreamedPrompts(path, template=PLAIN, block=10, seed=3)
    laps = [[prompts.row(draw)["i"] for draw in range(first, first + 37)] for first in (0, 37)]
    assert sorted(laps[0][:30]) == list(range(30))
    assert sorted({*laps[0], *laps[1]}) == list(range(37))
    assert laps[0][:10] != sorted(laps[0][:10])
    assert {i // 10 for i in laps[0][10:20]} == {1}
    assert [prompts.place(draw) for draw in range(37)] == laps[0]
    assert [StreamedPrompts(path, template=PLAIN, block=1).row(draw)["i"] for draw in range(5)] == [0, 1, 2, 3, 4]


def test_rows_without_an_answer(tmp_path):
    path = str(
        write_jsonl(tmp_path / "rows.jsonl", [{"problem": "1", "answer": "1"}, {"problem": "2", "answer": None}])
    )
    assert [StreamedPrompts(path, template=PLAIN, block=1, drop_unanswered=True).wanted(draw) for draw in (0, 1)] == [
        True,
        False,
    ]
    with pytest.raises(ValueError, match=r"got none in row 1 of 'rows': .* `drop_unanswered: true`"):
        StreamedPrompts(path, template=PLAIN, block=1).wanted(1)
    with pytest.raises(ValueError, match="which does not exist"):
        StreamedPrompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="to have the field 'question'"):
        StreamedPrompts(path, template=Template(user="{question}"))
    with pytest.raises(ValueError, match="`block` of at least 1 row, got 0"):
        StreamedPrompts(path, block=0)


def test_a_run_resumes_bit_equal(warm_model, path, tmp_path):
    """With prompts that are sampled anew: a checkpoint's next rows are not all in front of the reader."""

    def run(folder, steps, **options):
        prompts = StreamedPrompts(path, kind="exact", template=PLAIN, block=8, seed=1)
        rollouts = tiny.data(warm_model, train=prompts, oversample=2.0, engine=tiny.Backwards(batch_size=32))
        rollouts.verifiers.submit = tiny.parity
        prime, history = tiny.module(warm_model), tiny.History()
        saving = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        tiny.trainer(folder, steps, saving, history=history).fit(prime, rollouts, **options)
        draws = [[r.prompt.draw for r in out.batch.rollouts] for out in history.outputs]
        return history.rows, draws, dict(prime.state_dict())

    rows, draws, weights = run(tmp_path / "whole", 4)
    again, drawn, others = run(tmp_path / "rest", 4, ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    assert again == rows[2:]
    assert drawn == draws[2:]
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_row_without_an_answer_is_named_by_its_place_in_the_file(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"problem": "1 + 1"}\n')
    with pytest.raises(ValueError, match="got none in row 0 of 'bad': no answer"):
        StreamedPrompts(str(file)).wanted(0)  # row 0 of the file, whatever pass over it this is
