"""Rows that do not fit the engine's context end nothing: not training, not validation, not a benchmark."""

import json
import re

import pytest
import tiny
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import write_jsonl

from prime_lightning.__main__ import main
from prime_lightning.evaluation.callback import Benchmarks
from prime_lightning.prompts.dataset import DatasetPrompts, Template
from prime_lightning.rollout import Sampling
from prime_lightning.sampling.acceptance import Tally
from prime_lightning.sampling.validation import EvaluationLoader

CONTEXT, ROOM = 128, 8
LONG = 4
ONE = Sampling(samples=1, max_tokens=ROOM)


def rows(tmp_path, count=9, long=(LONG,), **options):
    """Rows of which some have one token more than the context leaves beside 8 of a completion, and some just fit."""
    length = [CONTEXT - ROOM + 1 if i in long else CONTEXT - ROOM if i % 2 else 6 for i in range(count)]
    made = [{"id": f"s{i}", "problem": f"^{'1' * (n - 2)}=", "answer": "2"} for i, n in enumerate(length)]
    path = write_jsonl(tmp_path / f"rows{count}.jsonl", made)
    return DatasetPrompts(path, kind="exact", template=Template(chat=False, user="{problem}"), **options)


def data(model, train, **options):
    return tiny.data(model, train=train, check_answers=False, prompts_per_batch=2, **options)


def draws(history):
    return [[r.prompt.draw for r in out.batch.rollouts[::4]] for out in history.outputs]


@pytest.mark.parametrize("options", [{}, {"surplus": "keep", "oversample": 2.0}, {"max_staleness": 1}])
def test_a_long_row_is_skipped_and_counted_in_training(warm_model, tmp_path, options):
    history = tiny.fit(tmp_path, tiny.module(warm_model), data(warm_model, rows(tmp_path, shuffle=False), **options), 4)
    assert [draw for batch in draws(history) for draw in batch] == [0, 1, 2, 3, 5, 6, 7, 8]
    counted = [row["rollout/long_prompts"] for row in history.rows if "rollout/long_prompts" in row]
    assert counted[0] == 1


def test_a_run_resumes_exactly_behind_a_long_row(warm_model, tmp_path):
    def run(folder, steps, ckpt=None):
        history = tiny.History()
        save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = tiny.trainer(folder, steps, save, history=history)
        trainer.fit(tiny.module(warm_model), data(warm_model, rows(tmp_path, shuffle=False)), ckpt_path=ckpt)
        return draws(history), history.rows, trainer.lightning_module.state_dict()

    whole, logged, weights = run(tmp_path / "whole", 5)
    for stopped in (2, 3):  # before the long row, and behind it
        rest, again, same = run(tmp_path / f"rest{stopped}", 5, tmp_path / "whole" / f"step={stopped}.ckpt")
        assert rest == whole[stopped:]
        assert again == logged[stopped:]
        assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_a_row_that_waited_is_skipped_where_the_context_has_become_too_short(warm_model, tmp_path):
    module = data(warm_model, rows(tmp_path, shuffle=False))
    module.setup("fit")
    loader, tally = module.training_loader(0, 1), Tally()
    loader.load_state_dict({"start": 0, "position": 6, "returned": [LONG, 5], "surplus": "[]"})
    assert [prompt.draw for prompt in loader.take(3, tally)] == [5, 6, 7]
    assert tally.metrics["rollout/long_prompts"] == 1
    module.close()


def test_only_long_rows_are_an_error_that_says_what_to_change(warm_model, tmp_path, monkeypatch):
    monkeypatch.setattr("prime_lightning.sampling.loader.LONG_PROMPTS_IN_A_ROW", 20)
    module = data(warm_model, rows(tmp_path, long=range(9)))
    module.setup("fit")
    words = r"at most 120 tokens, got 20 longer .* has 121.*`data.sampling.max_tokens` \(8\).* context of 128 tokens"
    with pytest.raises(ValueError, match=words):
        module.training_loader(0, 1).collect()
    module.close()


def test_a_long_row_is_left_out_of_validation(warm_model, tmp_path):
    long = {"validation": rows(tmp_path, shuffle=False), "validation_prompts": 9, "validation_sampling": ONE}
    trainer = tiny.trainer(tmp_path, 1)
    with pytest.warns(UserWarning, match=rf"1 of 9 prompts .* left out \(numbers \[{LONG}\]\).* 120 tokens"):
        (found,) = trainer.validate(tiny.module(warm_model), data(warm_model, rows(tmp_path), **long), verbose=False)
    assert found["val/long_prompts"] == 1
    short = {**long, "validation": rows(tmp_path, count=8, long=(), shuffle=False), "validation_prompts": 8}
    (without,) = tiny.trainer(tmp_path, 1).validate(
        tiny.module(warm_model), data(warm_model, rows(tmp_path), **short), verbose=False
    )
    assert without["val/long_prompts"] == 0


def test_ranks_validate_the_rows_that_fit_once(warm_model, tmp_path):
    module = data(warm_model, rows(tmp_path, shuffle=False))
    module.setup("validate")
    with pytest.warns(UserWarning, match="left out"):
        parts = [[*EvaluationLoader(module.source(module.train), ONE, 9, 1, rank, 3)] for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert sorted(r.prompt.draw for part in parts for b in part for r in b.rollouts) == [0, 1, 2, 3, 5, 6, 7, 8]
    counted = [batch.metrics.means()["rollout/long_prompts"] for part in parts for batch in part]
    assert sum(counted) == 1
    module.validation, module.validation_prompts = rows(tmp_path, long=range(9)), 9
    with pytest.raises(ValueError, match="Expected prompts to validate with of at most 120 tokens"):
        len(EvaluationLoader(module.source(module.validation), ONE, 9, 1, 0, 1))
    module.close()


# ---- benchmarks


@pytest.fixture
def benchmark(tmp_path):
    """Nine problems, the fifth of them too long."""
    rows(tmp_path)
    spec = {
        "title": "Ones",
        "licence": "ours",
        "rows": 9,
        "prompts": {
            "class_path": "prime_lightning.prompts.BenchmarkRows",
            "init_args": {"path": str(tmp_path / "rows9.jsonl"), "kind": "exact"},
        },
        "templates": {"prime": {"chat": False, "user": "{problem}"}},
        "sampling": {"samples": 2, "max_tokens": ROOM},
    }
    file = tmp_path / "ones.yaml"
    file.write_text(yaml.safe_dump(spec))
    return str(file)


def check(folder, result):
    """The long problem is wrong, for the reason that is told; the mean is over all nine."""
    samples = [json.loads(line) for line in folder.open()]
    assert [(row["draw"], row["sample"]) for row in samples] == [(p, k) for p in range(9) for k in range(2)]
    for row in samples[2 * LONG : 2 * LONG + 2]:
        assert (row["verdict"], row["score"], row["id"], row["completion"]) == ("wrong", 0.0, f"s{LONG}", "")
    assert result["problems"] == 9
    assert result["metrics"]["avg2"] == pytest.approx(sum(row["score"] for row in samples) / 18)
    assert result["not_asked"].keys() == {str(LONG)}
    assert re.search("121 tokens.*room for 120", result["not_asked"][str(LONG)])


def test_a_long_problem_of_a_benchmark_is_wrong_and_ends_no_training(warm_model, benchmark, tmp_path):
    callback = Benchmarks(str(tmp_path), [benchmark], every=1, before=False)
    with pytest.warns(UserWarning, match=f"1 problems of Ones count as wrong: problem {LONG} not asked: .* 121 tokens"):
        tiny.trainer(tmp_path, 2, callback).fit(tiny.module(warm_model), tiny.data(warm_model))
    results = [json.loads(line) for line in (tmp_path / "benchmarks.jsonl").open()]
    assert [row["iteration"] for row in results] == [1, 2]
    check(tmp_path / "benchmarks/ones/2.jsonl", results[1])


def test_a_benchmark_without_room_for_any_prompt_is_refused_before_training(warm_model, benchmark, tmp_path):
    callback = Benchmarks(str(tmp_path), [benchmark], every=10, before=False, max_tokens=CONTEXT)
    with pytest.raises(ValueError, match="Expected prompt and completion to fit the model's 128 positions"):
        tiny.trainer(tmp_path, 1, callback).fit(tiny.module(warm_model), tiny.data(warm_model))


def test_a_long_problem_is_wrong_and_asked_again_by_the_next_call(warm_model, benchmark, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["evaluate", "--model", str(warm_model), "--benchmark", benchmark, "--out", str(out)]
    for _ in range(2):  # the second asks the long one alone
        with pytest.warns(UserWarning, match="1 problems of Ones count as wrong"):
            assert main(command) == 0
        assert re.search(rf"Ones: problem {LONG} counts as wrong, not asked: .* 121 tokens", capsys.readouterr().out)
        lines = sorted((out / "ones.jsonl").read_text().splitlines(), key=lambda line: json.loads(line)["draw"])
        (tmp_path / "sorted.jsonl").write_text("\n".join(lines))
        check(tmp_path / "sorted.jsonl", json.loads((out / "results.json").read_text())["benchmarks"]["ones"])


def test_a_benchmark_of_long_problems_alone_is_wrong_throughout(warm_model, benchmark, tmp_path):
    rows(tmp_path, long=range(9))
    with pytest.warns(UserWarning, match="9 problems of Ones count as wrong"):
        assert main(["evaluate", f"--model={warm_model}", f"--benchmark={benchmark}", f"--out={tmp_path}/out"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["ones"]
    assert (found["metrics"]["avg2"], len(found["not_asked"])) == (0.0, 9)
