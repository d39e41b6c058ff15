"""`prime_lightning.train` and the other calls: the same as the commands, from Python."""

import json
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import write_jsonl

import prime_lightning
from prime_lightning.__main__ import main
from prime_lightning.algorithms import grpo
from prime_lightning.cli.call_config import call_layer
from prime_lightning.prm import ImplicitPRM
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, write_model
from prime_lightning.rollout import Sampling

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "max_steps": 2,
    "sampling": {"max_tokens": 8},
    "prompts_per_batch": 4,
    "accuracy_filter": {"low": 0.0, "high": 1.0},
    "seed": 3,
}


@pytest.fixture(scope="module")
def rows():
    problems = ArithmeticPrompts(seed=1, operations=2)
    return [{"problem": problems.row(draw)["problem"], "answer": "even", "least": 1} for draw in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model") / "init", seed=0))


@pytest.fixture(scope="module")
def finished(model, rows, tmp_path_factory):
    """A run whose reward is a closure that nobody can import, and the command that it printed."""
    even = set("02468")

    def reward(prompt, completion, row):
        assert prompt == row["problem"]
        return float(sum(c in even for c in completion) >= row["least"])

    folder = tmp_path_factory.mktemp("run") / "prime"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        run = prime_lightning.train(model, rows, reward, folder=folder, **SMALL)
    return run, next(line for line in printed if "prime-lightning fit" in line), printed


def answers(folder):
    lines = (Path(folder) / "rollouts.jsonl").read_text().splitlines()
    return [(row["iteration"], row["completion"], row["score"]) for row in map(json.loads, lines)]


def test_a_reward_that_is_a_closure_grades_every_answer(finished, rows):
    run, *_ = finished
    graded = answers(run.folder)
    assert len(graded) == 2 * 4 * 4
    assert all(score == any(c in "02468" for c in text) for _, text, score in graded)
    assert {score for _, _, score in graded} == {0.0, 1.0}


def test_the_command_that_is_printed_does_the_same(finished, tmp_path, monkeypatch):
    run, command, _ = finished
    dollar, path, program, *words = shlex.split(command)
    assert (dollar, path, program) == ("$", f"PYTHONPATH={run.folder}", "prime-lightning")
    monkeypatch.syspath_prepend(str(run.folder))
    assert main([*words, "--trainer.default_root_dir", str(tmp_path)]) == 0
    assert answers(tmp_path) == answers(run.folder)


def test_a_run_has_its_models_and_numbers(finished):
    run, *_ = finished
    assert list(run.metrics.index) == [0, 1]
    with (run.folder / "csv" / "version_0" / "metrics.csv").open() as file:
        assert "rollout/accuracy" in file.readline()
    assert run.metrics["rollout/accuracy"].between(0, 1).all()
    page = run.report()
    assert Path(str(page)).is_file()
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html')
    assert repr(run) == f"Run({str(run.folder)!r})"


def test_the_last_lines_name_the_folders_and_the_next_commands(finished):
    run, _, printed = finished
    lines = printed[-1].splitlines()
    assert lines[0] == f"Run: {run.folder}"
    assert f"  policy: {run.policy}" in lines
    assert f"    prime-lightning evaluate --model {run.policy} --benchmark math500" in lines
    assert f"    prime-lightning score --prm.folder {run.prm} --input ROWS.jsonl --out scored.jsonl" in lines
    assert f"    prime-lightning report {run.folder}" in lines
    (resumed,) = [line for line in lines if "--ckpt_path" in line]
    assert Path(shlex.split(resumed)[-1]).exists()


def test_score_and_rerank_are_the_commands(finished):
    run, *_ = finished
    row = {"prompt": "^1+6=", "response": "7;#7"}
    (scored,) = prime_lightning.score(run.prm, [row], detail="token")
    (alone,) = ImplicitPRM.from_pretrained(run.prm).score([row["prompt"]], [row["response"]])
    assert scored["token_rewards"] == pytest.approx(list(alone.token_rewards))
    several = [{**row, "label": 1.0}, {"prompt": "^1+6=", "response": "8;#8", "label": 0.0}]
    result = prime_lightning.rerank(run.prm, several, n=[1, 2], sets=4)
    assert result["problems"] == 1
    with pytest.raises(ValueError, match="label"):
        prime_lightning.rerank(run.prm, [row])


def test_evaluate_returns_what_the_command_writes(finished, tmp_path):
    run, *_ = finished
    found = prime_lightning.evaluate(run.policy, "arithmetic", limit=4, out=tmp_path / "e", workers=1)
    assert found == json.loads((tmp_path / "e" / "results.json").read_text())["benchmarks"]
    assert 0 <= found["arithmetic"]["metrics"]["accuracy"] <= 1


@dataclass
class Plain:
    a: int = 1


@pytest.mark.parametrize(
    ("options", "group", "written"),
    [
        ({"max_steps": 5}, ("trainer",), {"max_steps": 5}),
        ({"sampling": Sampling(samples=8)}, ("data", "sampling"), {"samples": 8}),
        ({"advantage": grpo}, ("model",), {"advantage": "prime_lightning.algorithms.advantage.grpo"}),
        ({"credit": {"process_weight": 0.5}}, ("model",), {"credit": {"process_weight": 0.5}}),
        ({"columns": {"answer": "solution"}}, ("data", "train", "init_args"), {"columns": {"answer": "solution"}}),
        ({"template": {"user": "{problem}!"}}, ("data", "train", "init_args", "template"), {"chat": False}),
        ({"seed": 7}, (), {"seed_everything": 7}),
        ({"loading": Plain()}, ("model",), {"loading": {"a": 1}}),
    ],
)
def test_options_are_found_by_name(options, group, written, model, rows, tmp_path):
    found = yaml.safe_load(yaml.safe_dump(call_layer(tmp_path, model, rows, None, "same", options)))
    for name in group:
        found = found[name]
    assert found | written == found


def test_what_is_inferred(model, tmp_path):
    maths = call_layer(tmp_path, model, [{"problem": "1+1", "answer": "2"}], None, None, {})
    assert maths["data"]["train"]["init_args"]["kind"] == "math"
    assert maths["model"] == {"policy": model, "prm": None, "reference": None}
    code = call_layer(tmp_path, model, [{"problem": "add", "tests": ["assert f(1) == 2"]}], None, "other", {})
    assert code["data"]["train"]["init_args"]["kind"] == "code"
    assert code["model"]["prm"] == "other"


def test_a_file_and_a_table_are_data_sets_too(model, rows, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "run"
    run = prime_lightning.train(model, path, "exact", prm=None, folder=folder, **SMALL | {"max_steps": 1})
    assert len(run.metrics) == 1
    assert yaml.safe_load((folder / "call.yaml").read_text())["data"]["train"]["init_args"]["path"] == path
    (tmp_path / "table").mkdir()
    table = call_layer(tmp_path / "table", model, datasets.Dataset.from_list(rows), None, "same", {})
    written = table["data"]["train"]["init_args"]["path"]
    assert [json.loads(line) for line in Path(written).read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda model: ("/nowhere/model", [{"problem": "1", "answer": "1"}]), "there is no such folder"),
        (lambda model: (model, [{"problem": "1", "answer": "1"}, {"problem": None, "answer": "2"}]), r"rows \[1\]"),
        (lambda model: (model, "no_such.jsonl"), "no_such.jsonl"),
        (lambda model: (model, ["1+1"]), "got a str"),
    ],
)
def test_a_call_that_could_not_begin_leaves_its_folder_free(given, words, model, tmp_path):
    with pytest.raises((ValueError, OSError), match=words):
        prime_lightning.train(*given(model), folder=tmp_path / "run", max_steps=1)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("name", ["max_step", "polcy", "train"])
def test_an_unknown_option_is_named(name, model, rows, tmp_path):
    with pytest.raises(ValueError, match=f"got '{name}'"):
        prime_lightning.train(model, rows, folder=tmp_path / "run", **{name: 1})


def test_what_yaml_cannot_hold_is_refused(model, rows, tmp_path):
    with pytest.raises(ValueError, match="got a ModelCheckpoint"):
        prime_lightning.train(model, rows, folder=tmp_path / "run", callbacks=[ModelCheckpoint()])


def test_options_that_the_parser_refuses_end_with_a_word(model, rows, tmp_path, capsys):
    with pytest.raises(ValueError, match="does not take these options"):
        prime_lightning.train(model, rows, folder=tmp_path / "run", sampling={"temprature": 1.0})
    assert "temprature" in capsys.readouterr().err


def test_nothing_of_an_earlier_run_is_written_over(finished, model, rows):
    with pytest.raises(ValueError, match="new or empty folder"):
        prime_lightning.train(model, rows, folder=finished[0].folder)


def test_no_rows_are_an_error(model, tmp_path):
    with pytest.raises(ValueError, match="Expected rows to train on, got none"):
        prime_lightning.train(model, [], folder=tmp_path / "run")


def test_the_example_of_a_reward_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLES / "own_reward.py"), run_name="__main__")
    accuracy = found["run"].metrics["rollout/accuracy"]
    assert accuracy.iloc[-1] > 0.9 > 0.6 > accuracy.iloc[0]


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells, with a short warm start and two iterations."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = "\n".join(sources).replace('"64000"', '"2560"').replace("limit=500", "limit=20")
    short = "max_steps=2, prompts_per_batch=8, accuracy_filter={'low': 0.0, 'high': 1.0}"
    text = text.replace("max_steps=40", short)
    assert all(part in text for part in ("2560", "limit=20", short))
    space = {}
    exec(compile(text, "quickstart.ipynb", "exec"), space)
    assert space["run"].metrics["rollout/accuracy"].count() == 2
    assert set(space["scored"]["step_texts"]) == {"7;", "4;", "#4"}
