"""The log of rollouts on disk."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toys import rollout

from prime_lightning.models.batch import Batch
from prime_lightning.prompts.arithmetic import build_tokenizer
from prime_lightning.rollout import Finish
from prime_lightning.training.callbacks.outputs import RolloutLog
from prime_lightning.training.panel import Iteration

MODULE = SimpleNamespace(tokenizer=build_tokenizer(), reward=SimpleNamespace(beta=0.5))
HOSTILE = [
    "\ud800 lone",
    "nul \x00 bell \x07",
    "line\nfeed\r\n\x85\u2028\u2029 end",
    '"}\n{"iteration": 0}',
    "\U0001f600 é",
]


def iteration(number, texts=("7;#7",) * 4, *, process=True, **changes):
    """An iteration of groups of two; scores are right, unknown, right, unknown, ..."""
    lengths = [2 + i % 3 for i in range(len(texts))]
    rows = [
        rollout(i // 2, response=[*[9, 38, 9][: lengths[i] - 1], 1], text=text, score=None if i % 2 else 1.0)
        for i, text in enumerate(texts)
    ]
    batch = Batch.of_groups([rows[i : i + 2] for i in range(0, len(rows), 2)])
    numbers_BT = torch.arange(batch.mask_BT.numel()).reshape(batch.mask_BT.shape) / 7
    scale = {"process/scale": 0.25} if process else {}
    made = Iteration(number, batch, numbers_BT if process else None, -numbers_BT, scale)
    return {"iteration": replace(made, **changes)}


def at(step, rank_zero=True):
    """What the callback asks of a trainer."""
    return SimpleNamespace(global_step=step, is_global_zero=rank_zero)


def written(log):
    return [json.loads(line) for line in log.path.read_text(encoding="ascii").split("\n")[:-1]]


def iterate(log, steps, **options):
    for step in steps:
        log.on_train_batch_end(at(step), MODULE, iteration(step - 1, **options), None, 0)


def test_a_line_says_all_of_a_response(tmp_path):
    log = RolloutLog(str(tmp_path / "run"), groups=4)
    iterate(log, [3])
    lines = written(log)
    assert len(lines) == 4
    expected = iteration(2)["iteration"]
    for i, line in enumerate(lines):
        source = expected.batch.rollouts[i]
        n = len(source.completion.token_ids)
        assert (line["iteration"], line["draw"], line["source"]) == (2, i // 2, "sums")
        assert (line["prompt"], line["answer"], line["completion"]) == ("^1+6=", "7", "7;#7")
        assert line["tokens"] == [MODULE.tokenizer.decode([token]) for token in source.completion.token_ids]
        assert (line["finish"], line["verdict"]) == ("stop", "unknown" if i % 2 else "correct")
        assert line["score"] == (None if i % 2 else 1.0)
        assert (line["beta"], line["scale"]) == (0.5, 0.25)
        assert line["process_reward"] == pytest.approx(expected.process_BT[i, :n].tolist(), rel=1e-4)
        assert line["advantage"] == pytest.approx(expected.advantage_BT[i, :n].tolist(), rel=1e-4)


def test_groups_and_iterations_are_thinned(tmp_path):
    log = RolloutLog(str(tmp_path), groups=1, every=3)
    iterate(log, range(1, 8))
    assert [(line["iteration"], line["draw"]) for line in written(log)] == [(i, 0) for i in (0, 0, 3, 3, 6, 6)]


def test_groups_are_counted_on_a_rank_that_has_none_of_the_first(tmp_path):
    log = RolloutLog(str(tmp_path), groups=2)
    made = iteration(0, texts=("7;#7",) * 6)
    made["iteration"].batch.group_B = torch.tensor([3, 3, 17, 17, 40, 40])  # as groups are dealt to several ranks
    log.on_train_batch_end(at(1), MODULE, made, None, 0)
    assert [line["draw"] for line in written(log)] == [0, 0, 1, 1]


def test_without_a_prm_there_are_no_process_rewards(tmp_path):
    log = RolloutLog(str(tmp_path))
    iterate(log, [1], process=False)
    assert all(not {"process_reward", "scale"} & line.keys() and "advantage" in line for line in written(log))


def test_only_rank_zero_writes(tmp_path):
    log = RolloutLog(str(tmp_path))
    log.on_train_batch_end(at(1, rank_zero=False), MODULE, iteration(0), None, 0)
    assert not log.path.exists()


def test_hostile_text_stays_one_line_and_comes_back(tmp_path):
    log = RolloutLog(str(tmp_path), groups=9)
    texts = [*HOSTILE, "last"]
    iterate(log, [1, 2], texts=texts)
    assert [line["completion"] for line in written(log)] == texts * 2
    log.on_train_start(at(1), MODULE)
    assert [(line["iteration"], line["completion"]) for line in written(log)] == [(0, text) for text in texts]


@pytest.mark.parametrize("tail", ["", '{"iteration": 1, "dra', "7", "[]", "null", "{}\n", "\x00\x00\x00", "\n\n"])
def test_a_resumed_run_forgets_later_lines_and_one_that_was_cut_off(tmp_path, tail):
    log = RolloutLog(str(tmp_path))
    iterate(log, range(1, 6))
    whole = log.path.read_text()
    with log.path.open("a") as file:
        file.write(tail)
    resumed = RolloutLog(str(tmp_path))
    resumed.on_train_start(at(3), MODULE)  # iterations 0, 1, 2 are done
    assert {line["iteration"] for line in written(resumed)} == {0, 1, 2}
    iterate(resumed, [4, 5])
    assert resumed.path.read_text() == whole


def test_a_run_from_the_start_begins_a_new_log(tmp_path):
    log = RolloutLog(str(tmp_path))
    log.on_train_start(at(0), MODULE)
    iterate(log, [1, 2])
    log.on_train_start(at(0), MODULE)
    assert written(log) == []


def test_a_truncated_response_is_logged_as_such(tmp_path):
    cut = iteration(0, batch=Batch.of_groups([[rollout(finish=Finish.LENGTH, score=0.25)]]))
    log = RolloutLog(str(tmp_path))
    log.on_train_batch_end(at(1), MODULE, cut, None, 0)
    [line] = written(log)
    assert (line["finish"], line["verdict"], line["score"]) == ("length", "partial", 0.25)
