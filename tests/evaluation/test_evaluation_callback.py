"""Benchmarks while training runs: what is written and logged, and that training is as without them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from prime_lightning.evaluation.callback import Benchmarks
from prime_lightning.training.sft import LessonDataModule, SFTModule

SPEC = {
    "title": "Two-step chains",
    "licence": "ours",
    "rows": 12,
    "prompts": {
        "class_path": "prime_lightning.prompts.ArithmeticPrompts",
        "init_args": {"seed": 99, "operations": 2},
    },
    "templates": "text",
    "sampling": {"samples": 4, "max_tokens": 8},
    "metrics": ["math_accuracy", "pass_at_k", "majority_vote"],
}


@pytest.fixture
def chains(tmp_path):
    path = tmp_path / "chains.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return str(path)


def run(folder, model, *callbacks, steps=3, ckpt=None, **options):
    torch.manual_seed(0)
    history, prime = tiny.History(), tiny.module(model)
    trainer = tiny.trainer(folder, steps, *callbacks, history=history, **options)
    trainer.fit(prime, tiny.data(model), ckpt_path=ckpt)
    return trainer, prime, history


def lines(folder):
    return [json.loads(line) for line in (folder / "benchmarks.jsonl").open()]


def test_a_run_with_benchmarks_is_a_run_without_them(warm_model, chains, tmp_path):
    _, plain, without = run(tmp_path / "without", warm_model)
    rng = torch.get_rng_state()
    folder = tmp_path / "with"
    _, watched, history = run(folder, warm_model, Benchmarks(str(folder), [chains], every=2))
    assert torch.equal(rng, torch.get_rng_state())
    training = [row for row in history.rows if not any(name.startswith("chains/") for name in row)]
    assert training == without.rows
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name

    results = lines(folder)
    assert [(row["iteration"], row["version"]) for row in results] == [(0, 0), (2, 2), (3, 3)]
    for row in results:
        assert row["benchmark"] == "chains"
        assert (row["problems"], row["samples"]) == (12, 4)
        assert set(row["metrics"]) == {
            "avg4", "pass1", "pass2", "pass4", "maj4", "truncated", "length", "unknown",
        }  # fmt: skip
        low, high = row["interval"]["avg4"]
        assert low < row["metrics"]["avg4"] < high
        assert row["stderr"]["avg4"] > 0
        assert row["seconds"] > 0
        samples = [json.loads(line) for line in (folder / f"benchmarks/chains/{row['iteration']}.jsonl").open()]
        assert [(s["draw"], s["sample"]) for s in samples] == [(p, k) for p in range(12) for k in range(4)]
        scores = [s["score"] for s in samples]
        assert row["metrics"]["avg4"] == pytest.approx(sum(scores) / 48)
        assert row["metrics"]["length"] == pytest.approx(sum(s["length"] for s in samples) / 48)
    logged = [row for row in history.rows if "chains/avg4" in row]
    assert [row["chains/avg4"] for row in logged] == [row["metrics"]["avg4"] for row in results]
    assert logged[0]["chains/avg4_stderr"] == results[0]["stderr"]["avg4"]


def test_it_drives_the_checkpoint_and_a_resumed_run_goes_on(warm_model, chains, tmp_path):
    def callbacks():
        best = ModelCheckpoint(tmp_path, "best-{step}", monitor="chains/avg4", mode="max", every_n_train_steps=1)
        return Benchmarks(str(tmp_path), [chains], every=1, before=False, limit=5), best

    trainer, _, _ = run(tmp_path, warm_model, *callbacks())
    best = trainer.checkpoint_callback
    values = {row["iteration"]: row["metrics"]["avg4"] for row in lines(tmp_path)}
    assert list(values) == [1, 2, 3]
    assert float(best.best_model_score) == pytest.approx(max(values.values()))
    assert f"step={max(values, key=values.get)}" in best.best_model_path
    (tmp_path / "benchmarks.jsonl").open("a").write('{"iteration": 4, "benchmark": "chains", "metr')  # a crash
    middle = tmp_path / "middle.ckpt"
    run(tmp_path, warm_model, ModelCheckpoint(tmp_path, "middle", every_n_train_steps=2), steps=2)
    trainer, _, _ = run(tmp_path, warm_model, *callbacks(), ckpt=str(middle))
    assert {row["iteration"]: row["metrics"]["avg4"] for row in lines(tmp_path)} == values
    assert lines(tmp_path)[0]["problems"] == 5


def test_mistakes_end_the_run_before_it_begins(warm_model, chains, tmp_path):
    with pytest.raises(ValueError, match="Expected `every` and `limit` of at least 1, got 0 and None"):
        Benchmarks(str(tmp_path), [chains], every=0)
    with pytest.raises(ValueError, match="Expected a benchmark of"):
        run(tmp_path, warm_model, Benchmarks(str(tmp_path), ["math5000"]))
    lessons = LessonDataModule(str(warm_model), tiny.ArithmeticLessons(size=64, operations=2), batch_size=8)
    trainer = tiny.trainer(tmp_path, 1, callbacks=[Benchmarks(str(tmp_path), [chains])])
    with pytest.raises(ValueError, match="Expected a data module with an engine"):
        trainer.fit(SFTModule(str(warm_model)), lessons)
    assert not (tmp_path / "benchmarks.jsonl").exists()


def test_a_model_that_falls_silent_is_reported(silent_model, chains, tmp_path):
    with pytest.warns(UserWarning, match="All completions of chains are empty after 0 iterations"):
        run(tmp_path, silent_model, Benchmarks(str(tmp_path), [chains], limit=2), steps=1)
    assert lines(tmp_path)[0]["metrics"]["avg4"] == 0.0
    assert not math.isnan(lines(tmp_path)[0]["interval"]["avg4"][1])


def test_it_takes_turns_with_sampling_ahead(warm_model, chains, tmp_path):
    callback = Benchmarks(str(tmp_path), [chains], every=1, limit=3)
    data = tiny.data(warm_model, max_staleness=1)
    tiny.trainer(tmp_path, 3, callback).fit(tiny.module(warm_model), data)
    assert [(row["iteration"], row["version"]) for row in lines(tmp_path)] == [(i, i) for i in range(4)]


@pytest.mark.slow
def test_two_ranks_share_the_problems_and_get_the_same_numbers(sharp_folder, tmp_path):
    path = tmp_path / "chains.yaml"
    path.write_text(yaml.safe_dump(SPEC | {"rows": 5}))
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, sharp_folder, Benchmarks(str(one), [str(path)], after=False), steps=1)
    script = Path(__file__).with_name("two_ranks.py")
    ran = subprocess.run(
        [sys.executable, script, two, sharp_folder, path], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    [alone], [shared] = lines(one), lines(two)
    for name in ("problems", "samples", "interval", "stderr", "version"):
        assert alone[name] == shared[name]
    assert alone["metrics"] == pytest.approx(shared["metrics"])
    assert (one / "benchmarks/chains/0.jsonl").read_text() == (two / "benchmarks/chains/0.jsonl").read_text()
