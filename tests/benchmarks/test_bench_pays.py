"""The benchmark of rollouts to an accuracy: its smallest form runs and goes on where it was stopped; its numbers."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pays
import pays_summary
import pays_tasks

from prime_lightning.cli.commands.quickstart import config
from prime_lightning.cli.lightning_cli import parsed
from prime_lightning.prompts.arithmetic import build_tokenizer, step_truth
from prime_lightning.rollout import Completion, Finish, Prompt, Rollout, Verdict
from prime_lightning.rollout.files import whole_rows

SETTINGS = yaml.safe_load(pays.SETTINGS.read_text())
TINY = {
    "budget": 16,
    "max_tokens": 6,
    "prompts": {"class_path": "pays_tasks.LookupPrompts", "init_args": {"keys": 1}},
    "lessons": {"class_path": "pays_tasks.LookupLessons", "init_args": {"size": 1280, "keys": 1}},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The shipped settings with one task that is over in a moment."""
    settings = json.loads(json.dumps(SETTINGS)) | {"problems": 16, "window": 8, "thresholds": [0.01]}
    settings["tasks"], settings["tuned"] = {"tiny": TINY}, {"tiny": json.loads(json.dumps(SETTINGS["tuned"]["A"]))}
    for tuned in settings["tuned"]["tiny"].values():
        tuned["data.prompts_per_batch"] = 2
    for method in settings["methods"].values():
        method["data"] = {"prompts_per_batch": 2, "accuracy_filter": {"low": 0.0, "high": 1.0}}
    file = tmp_path_factory.mktemp("settings") / "small.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_the_smallest_form_runs_and_goes_on_where_it_was_stopped(small, tmp_path, capsys):
    words = ["--settings", str(small), "--out", str(tmp_path), "--task", "tiny", "--seeds", "0"]
    pays.main(["run", *words, "--method", "rloo", "prime", "oracle"])
    file = tmp_path / "cells.jsonl"
    cells = list(whole_rows(file))
    assert [cell["method"] for cell in cells] == ["rloo", "prime", "oracle"]
    assert len({cell["pass1_before"] for cell in cells}) == 1  # of one warm start
    for cell in cells:
        assert [n for n, _ in cell["curve"]] == [8, 8]  # 2 prompts, 4 samples, until 16 are there
        assert cell["tokens"] > 0
        assert 0 <= cell["pass1_after"] <= 1
        judged = [auc is not None for auc in cell["step_auc"]]
        assert any(judged) == (cell["method"] != "rloo")
        assert len(judged) == 2
    told = capsys.readouterr().out
    assert "- prime: **" in told
    assert "| oracle | 1 |" in told
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n")
    pays.main(["run", *words, "--method", "rloo", "prime", "oracle"])
    again = file.read_text().splitlines()
    assert again[:2] == lines[:2]
    assert json.loads(again[2])["curve"] == cells[2]["curve"]  # the last one, done anew
    pays.main(["run", *words, "--method", "rloo", "prime", "oracle"])
    assert file.read_text().splitlines() == again


def test_tuning_runs_every_candidate_and_ranks_them(small, tmp_path, capsys):
    settings = yaml.safe_load(small.read_text())
    settings["grids"]["rloo"] = {"model.policy_optimizer.init_args.lr": [1e-3, 2e-3]}
    few = tmp_path / "few.yaml"
    few.write_text(yaml.safe_dump(settings))
    words = ["--settings", str(few), "--out", str(tmp_path), "--task", "tiny", "--seeds", "0", "--method", "rloo"]
    pays.main(["tune", *words])
    cells = list(whole_rows(tmp_path / "tuning.jsonl"))
    assert [cell["chosen"]["model.policy_optimizer.init_args.lr"] for cell in cells] == [1e-3, 2e-3]
    assert capsys.readouterr().out.count("| tiny | rloo |") == 2
    pays.main(["summary", "--out", str(tmp_path)])  # of tuning nothing is reported
    assert "tiny" not in capsys.readouterr().out
    settings["problems"] = 8
    few.write_text(yaml.safe_dump(settings))
    pays.main(["tune", *words])  # cells of other settings are others
    assert len(list(whole_rows(tmp_path / "tuning.jsonl"))) == 4


def test_the_best_candidate_stands_first():
    cells = [made("rloo", s, *shares) | {"chosen": {"lr": lr}} for lr, s, shares in (
        (1, 0, (0.1, 0.2, 0.6)), (1, 1, (0.1, 0.6)), (2, 0, (0.1, 0.6)), (2, 1, (0.6,)),
    )]  # fmt: skip
    lines = pays.ranking(cells, [0.5]).splitlines()[2:]
    assert [line.split(" | ")[2:] for line in lines] == [['`{"lr": 2}`', "2", "15 |"], ['`{"lr": 1}`', "2", "25 |"]]


@pytest.mark.parametrize("method", list(SETTINGS["methods"]))
@pytest.mark.parametrize("task", list(SETTINGS["tasks"]))
def test_all_settings_are_those_of_a_run(task, method, tmp_path):
    grid, tuned = SETTINGS["grids"][method], SETTINGS["tuned"][task][method]
    every = list(pays.candidates(grid, tuned))
    assert len(every) == math.prod(map(len, grid.values())) == 18  # the same budget for each
    layer = pays.merged(pays.common(SETTINGS, task, 3), SETTINGS["methods"][method])
    for name, value in every[-1].items():
        layer = pays.merged(layer, pays.nested(name, value))
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(layer))
    made = parsed(["--config", str(config("quickstart.yaml")), "--config", str(tmp_path / "layer.yaml")])
    assert made.data.train.init_args.seed == 3
    assert made.model.policy_update.epochs == 4
    assert made.data.prompts_per_batch == 16
    assert (made.model.prm is None) == (method in ("rloo", "grpo", "oracle"))


# ---- numbers


curves = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=30)


@given(curves, st.floats(1, 200), st.floats(0, 1))
def test_a_threshold_is_reached_where_a_window_around_is_that_good(curve, window, threshold):
    rollouts = [n for n, _ in curve]
    half = max(0, round((window / statistics.fmean(rollouts) - 1) / 2))
    expected = None
    for i in range(half, len(curve) - half):
        inside = range(i - half, i + half + 1)
        share = sum(curve[j][0] * curve[j][1] for j in inside) / sum(curve[j][0] for j in inside)
        if share >= threshold:
            expected = sum(rollouts[: i + 1])
            break
    assert pays_summary.reached(curve, threshold, window) == expected


def made(method, seed, *shares, budget=1000):
    curve = [(10, share) for share in shares]
    return {"task": "A", "method": method, "seed": seed, "curve": curve, "window": 1, "budget": budget, "step_auc": []}


def test_ratios_are_paired_by_seed_and_a_threshold_never_reached_counts_as_the_budget():
    cells = [
        made("rloo", 0, 0.1, 0.2, 0.6, 0.7), made("prime", 0, 0.1, 0.6, 0.7),
        made("rloo", 1, 0.1, 0.6), made("prime", 1, 0.1, 0.2, budget=80),
        made("prime", 2, 0.9),
    ]  # fmt: skip
    assert pays_summary.paired(cells, "rloo", "prime", [0.5]) == [[30 / 20], [20 / 80]]
    mean, low, high = pays_summary.ratio([(30, 20), (20, 80)])
    logs = [math.log(1.5), math.log(0.25)]
    half = 12.706 * statistics.stdev(logs) / math.sqrt(2)
    centre = statistics.fmean(logs)
    assert (mean, low, high) == pytest.approx([math.exp(x) for x in (centre, centre - half, centre + half)])


def test_the_points_of_students_t_are_its_own():
    """By integrating its density: 95 % of it lie between -t and t."""
    for freedom, point in enumerate(pays_summary.T95, start=1):
        size = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        steps = 20_000
        grid = [point * (i + 0.5) / steps for i in range(steps)]
        inside = 2 * sum(size * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in grid) * point / steps
        assert inside == pytest.approx(0.95, abs=5e-5)


# ---- the look-ups and the oracle


def answered(prompt, text):
    tokens = [build_tokenizer().convert_tokens_to_ids(c) for c in text]
    zeros = [0] * len(tokens)
    done = Completion(text=text, token_ids=tokens, logprobs=zeros, finish=Finish.STOP, versions=zeros)
    return Rollout(prompt=prompt, completion=done, verdict=Verdict.of_score(0.0))


def test_lessons_say_the_truth_as_often_as_their_table_has_it():
    true, wrong, right = pays_tasks.table(5, 0.5, 0.2, 0.8, 0.99)
    assert ((right < 0.9).sum(), len(true)) == (48, 96)
    said = [0] * 96, [0] * 96
    for lesson in pays_tasks.LookupLessons(size=4000, keys=4, table_seed=5):
        body = lesson["problem"][1:-1]
        steps, final = lesson["response"].split("#")
        assert steps.replace(";", "") == final
        for i, digit in enumerate(final):
            key = "+-*".index(body[2 * i]) * 32 + pays_tasks.DIGITS.index(body[2 * i + 1])
            assert digit in (pays_tasks.DIGITS[true[key]], pays_tasks.DIGITS[wrong[key]])
            said[0][key] += digit == pays_tasks.DIGITS[true[key]]
            said[1][key] += 1
    gaps = [hits / count - float(right[key]) for key, (hits, count) in enumerate(zip(*said, strict=True))]
    assert max(map(abs, gaps)) < 0.2
    assert abs(statistics.fmean(gaps)) < 0.01


def test_each_step_has_its_tokens_and_its_truth():
    prompts = pays_tasks.LookupPrompts(seed=1, keys=3)
    prompt = prompts.prompt(0, build_tokenizer())
    true = prompt.answer
    bad = "0" if true[1] != "0" else "1"
    text = f"{true[0]};{bad};{true[2]};#{true}"
    tokens = list(text)
    assert pays_tasks.spans(answered(prompt, text), tokens) == [(0, 2, True), (2, 4, False), (4, 6, True)]
    assert pays_tasks.spans(answered(prompt, "#"), ["#"]) == []
    chain = Prompt(draw=0, token_ids=(), text="^5-8+7*2=", kind="exact", source="arithmetic", row={"modulus": 10})
    found = pays_tasks.spans(answered(chain, "7;5;0;#0"), list("7;5;0;#0"))
    assert [right for *_, right in found] == step_truth("^5-8+7*2=", "7;5;0;#0") == [True, False, True]


def test_hops_follow_their_relations_and_a_step_is_judged_from_the_one_before():
    true, wrong, right = pays_tasks.hop_table(5, 4)
    assert sorted(true[32:64]) == list(range(32))
    assert (len(true), int((right < 0.9).sum())) == (128, 38)
    assert all(true != wrong)
    prompt = pays_tasks.HopPrompts(seed=1, hops=4, relations=4, table_seed=5).prompt(0, build_tokenizer())
    stood, walked = prompt.text[1], []
    for relation in prompt.text[2:-1]:
        stood = pays_tasks.DIGITS[true["+-*0".index(relation) * 32 + pays_tasks.DIGITS.index(stood)]]
        walked.append(stood)
    assert prompt.answer == walked[-1]
    assert pays_tasks.truths(answered(prompt, ";".join([*walked, "#" + prompt.answer]))) == [True] * 4
    third = pays_tasks.DIGITS[true["+-*0".index(prompt.text[4]) * 32]]  # from 0, which the second step says wrongly
    assert walked[1] != "0"
    assert pays_tasks.truths(answered(prompt, f"{walked[0]};0;{third};;")) == [True, False, True, False]
    assert pays_tasks.truths(answered(prompt, "+;;?;")) == [False] * 3


def test_lessons_of_hops_slip_as_often_as_their_table_says():
    true, wrong, right = pays_tasks.hop_table(5, 4)
    said = torch.zeros(2, 128)
    for lesson in pays_tasks.HopLessons(size=3000, hops=6, relations=4, table_seed=5):
        steps, final = lesson["response"].split("#")
        stood = [lesson["problem"][1], *steps.split(";")[:-1]]
        assert stood[-1] == final
        for relation, left, value in zip(lesson["problem"][2:-1], stood, stood[1:], strict=False):
            key = pays_tasks.fact(relation, left)
            assert value in (pays_tasks.DIGITS[true[key]], pays_tasks.DIGITS[wrong[key]])
            said[:, key] += torch.tensor([value == pays_tasks.DIGITS[true[key]], 1.0])
    gaps = said[0] / said[1] - torch.tensor(right)
    assert float(gaps.abs().max()) < 0.2
    assert abs(float(gaps.mean())) < 0.01


def test_the_step_auc_is_the_share_of_pairs():
    prompts = pays_tasks.LookupPrompts(seed=1, keys=3)
    prompt = prompts.prompt(0, build_tokenizer())
    true = prompt.answer
    bad = "0" if true[1] != "0" else "1"
    rollout = answered(prompt, f"{true[0]};{bad};{true[2]};")
    reward_BT = torch.tensor([[0.1, 0.1, 0.2, 0.3, 0.4, 0.3]])  # steps 0.2 (right), 0.5 (wrong), 0.7 (right)
    batch = type("Made", (), {"rollouts": [rollout]})()
    assert pays_tasks.step_auc(reward_BT, batch, build_tokenizer()) == 0.5


def test_what_is_recommended_is_what_was_measured():
    recommended = yaml.safe_load((Path(__file__).parents[2] / "conf/mode/recommended.yaml").read_text())
    measured = json.loads(json.dumps(SETTINGS["methods"]["fixed"]))
    measured["model"]["policy_update"]["epochs"] = SETTINGS["tuned"]["A"]["fixed"]["model.policy_update.epochs"]
    del measured["data"]["prompts_per_batch"]  # of the task
    assert recommended == measured
