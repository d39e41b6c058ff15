"""The benchmark on word problems: its stages in their smallest form, what it says of them, and whom it blames."""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from word_rows import problems, simple

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import models
import word_problems
import word_problems_credit as blame
import word_problems_lessons as teach
import word_problems_summary

from prime_lightning.__main__ import main
from prime_lightning.cli.lightning_cli import lightning
from prime_lightning.prm.implicit import Scored
from prime_lightning.report.runs import read_metrics

SETTINGS = yaml.safe_load(word_problems.SETTINGS.read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory, chat_model):
    """The shipped settings, cut down; files of made-up problems; and the options that name them."""
    folder = tmp_path_factory.mktemp("words")
    settings = json.loads(json.dumps(SETTINGS))
    cpu = settings["cpu"]
    cpu |= {"lessons": 8, "of_each": 10, "variants": 1, "stories": 3, "held_out": 4, "save_every": 1}
    cpu["warm"]["data"]["batch_size"] = 4
    cpu["rl"]["trainer"]["max_steps"] = 2
    for adapters in ("policy_lora", "prm_lora"):
        cpu["rl"]["model"][adapters]["target_modules"] = r".*\.layers\.1\..*_proj"  # its upper half
    cpu["rl"]["data"] |= {"prompts_per_batch": 2, "sampling": {"samples": 4, "max_tokens": 6}}
    cpu["evaluation"] |= {"limit": 2, "max_tokens": 6}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    teach.write(folder / "train.jsonl", [*problems(4), *simple(12), *problems(4)])
    teach.write(folder / "test.jsonl", problems(1000))
    files = ["--train", str(folder / "train.jsonl"), "--test", str(folder / "test.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    config = AutoConfig.from_pretrained(chat_model, vocab_size=len(tokenizer), tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return [*files, "--settings", str(folder / "settings.yaml"), "--model", str(folder / "model")]


def noted(out):
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_all_stages_run_once_and_are_told(small, tmp_path, capsys):
    words = [*small, "--out", str(tmp_path)]
    for stage in (["warm"], ["rl", "--method", "rloo"], ["rl"], ["eval"], ["credit"]):
        word_problems.main([*stage, *words])
    stages = noted(tmp_path)
    assert [one["stage"] for one in stages] == ["warm", "rl", "rl", *["eval"] * 4, "credit"]
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 10 + 3  # of one step, and stories
    assert stages[0]["lessons"] == 8
    for run in stages[1:3]:
        assert run["curve"]["rollout/responses"] == [8.0, 8.0]  # equal cost
        assert bool(run["curve"]["prm/ce"]) == (run["method"] == "prime")
    assert {one["model"] for one in stages[3:7]} == {"untrained", "warm", "rloo-seed0", "prime-seed0"}
    told = capsys.readouterr().out
    assert "| SVAMP, greedy |" in told
    assert "| prime, seed 0 |" in told
    word_problems.main(["rl", *words])
    assert "done before" in capsys.readouterr().out
    assert noted(tmp_path) == stages


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(small, tmp_path):
    outs = [tmp_path / "whole", tmp_path / "stopped"]
    for out in outs:
        word_problems.main(["warm", *small, "--out", str(out)])
    options = word_problems.parser().parse_args(["rl", *small, "--out", str(outs[1])])
    settings = yaml.safe_load(Path(options.settings).read_text())
    configs, layer = word_problems.rl_layers(options, settings, outs[1])
    folder = word_problems.folder_of(outs[1], options)
    folder.mkdir()
    (folder / "layer.yaml").write_text(
        yaml.safe_dump(word_problems.merged(layer, word_problems.placed("fit", folder, 1)))
    )
    lightning([*word_problems.command("fit", configs, folder, 0), "--trainer.max_steps", "1"])
    for out in outs:
        word_problems.main(["rl", *small, "--out", str(out)])
    whole, stopped = (weights(out / "prime-seed0" / "policy") for out in outs)
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    curves = [noted(out)[1]["curve"] for out in outs]
    assert curves[0] == curves[1]
    assert list(read_metrics(folder / "csv" / "version_1" / "metrics.csv")) == [1]  # the second iteration alone
    assert not (folder / "checkpoints").exists()


QWEN_1_5B = models.QWEN | {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
}  # fmt: skip


@pytest.mark.parametrize("method", ["rloo", "prime"])
@pytest.mark.parametrize(("device", "gib", "fits"), [("cuda24", 24, 0), ("cuda80", 80, 0), ("cuda80", 24, 1)])
def test_the_settings_for_a_card_fit_it(device, gib, fits, method, tmp_path):
    options = word_problems.parser().parse_args(["rl", "--device", device, "--method", method])
    configs, layer = word_problems.rl_layers(options, SETTINGS, tmp_path)
    layer = word_problems.merged(layer, word_problems.placed("fit", tmp_path, 20))
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(layer))
    shape = {"model_type": "qwen2", "tie_word_embeddings": True, **QWEN_1_5B}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    words = [word for path in (*configs, tmp_path / "layer.yaml") for word in ("--config", str(path))]
    assert main(["plan", *words, "--gpu-memory", str(gib), "--model-config", str(tmp_path / "config.json")]) == fits


@given(st.integers(0, 19), st.integers(0, 5), st.integers(1, 50), st.booleans())
def test_the_first_wrong_word_is_blamed_and_what_follows_is_left_out(which, place, off, swapped):
    row = list(problems(20))[which]
    way = list(teach.checked(row).ways())[swapped]
    words = teach.worked(way).split()
    assert blame.word_truths(words, row) == [True] * len(words)
    broken = [*words[:place], str(1000 + off), *words[place + 1 :]]
    assert blame.word_truths(broken, row) == [True] * place + [False]


def test_rewards_of_words_are_the_sums_of_their_tokens():
    tokens = ["Add", ":", " \\boxed{2", " *", " 1", "2}", " <", "<end>"]
    rewards = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    one = Scored(tokens=tokens, token_rewards=rewards, steps=[], step_rewards=[], step_tokens=[], reward=255.0)
    row = {"problem": "2 and 3", "answer": "5", "equation": "+ number0 number1"}
    parts = blame.judged_words("Add: \\boxed{2 * 12} <", one, row)
    assert parts.truths == [True, True, False]
    assert parts.rewards == [3, 4, 8]


def test_the_interval_of_an_auc_holds_it_and_narrows():
    parts = [blame.Parts(truths=[True, True, False], rewards=[0.3, 0.1, r]) for r in (0.0, 0.2, 0.4, 0.2)]
    few, many = (blame.measured(parts * n) for n in (1, 20))
    assert few["auc"] == many["auc"] == 0.5
    assert few["interval"][0] < many["interval"][0] < 0.5 < many["interval"][1] < few["interval"][1]
    assert blame.measured([blame.Parts(truths=[True], rewards=[0.3])])["interval"] is None


@pytest.mark.parametrize(
    ("stage", "train", "said"),
    [
        (["warm"], '{"problem": "2 and 3", "answer": "5"}', "without 'equation'"),
        (["warm"], "# Problems", "a JSON object in line 1"),
        (["warm", "--device", "cuda24"], "{}", "begin with `rl`"),
        (["rl"], "{}", "warm --train FILE"),
        (["credit", "--device", "cuda24"], "{}", "with a warm start"),
        (["credit", "--seed", "3"], "{}", "rl --method prime --seed 3"),
        (["rl", "--settings", "none.yaml"], "{}", "got 'none.yaml'"),
    ],
)
def test_what_is_missing_is_said_in_a_line(stage, train, said, tmp_path):
    (tmp_path / "train.jsonl").write_text(train + "\n")
    words = ["--train", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as error:
        word_problems.main([*stage, *words])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_command_cannot_do_it_says_and_the_stage_ends(small, tmp_path, capsys):
    teach.write(tmp_path / "short.jsonl", problems(3))
    with pytest.raises(SystemExit) as ended:
        word_problems.main(["eval", *small, "--test", str(tmp_path / "short.jsonl"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert re.match(r"prime-lightning: Expected .*1,?000.* got 3", capsys.readouterr().err)
    assert not (tmp_path / "out" / "stages.jsonl").exists()


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (
            {"cpu": {key: value for key, value in SETTINGS["cpu"].items() if key != "stories"}},
            "to have cpu.stories, as",
        ),
        ({"methods": {"rloo": {}}}, "to have methods.prime, as"),
        ({"methods": None}, "to have methods.rloo, methods.prime, as"),
        (dict.fromkeys(SETTINGS), "to have cpu.model, cpu.configs, "),
    ],
)
def test_settings_of_before_say_what_they_lack(kept, said, tmp_path):
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(SETTINGS | kept))
    with pytest.raises(SystemExit, match=said):
        word_problems.main(["rl", "--settings", str(tmp_path / "old.yaml"), "--out", str(tmp_path)])


def test_the_last_of_a_stage_counts_and_gains_are_points_above_the_warm_start():
    def evaluated(model, right):
        accuracy = sum(right) / len(right)
        result = {"title": "SVAMP", "problems": 10, "metrics": {"accuracy": accuracy}, "interval": {"accuracy": [0, 1]}}
        return {
            "stage": "eval", "model": model, "result": result, "parts": {"few": 0.5, "many": 0.25}, "right": right,
        }  # fmt: skip

    none, some, most = [0.0] * 10, [0.0] * 8 + [1.0] * 2, [1.0, 0.0] * 4 + [1.0, 1.0]
    table = word_problems_summary.summary(
        [evaluated("warm", none), evaluated("warm", some), evaluated("prime-seed0", most), evaluated("untrained", none)]
    )
    assert table.count("| warm |") == 1
    spread = 196 * statistics.stdev([1, 0] * 4 + [0, 0]) / math.sqrt(10)
    gain = f"+40.0 ({40 - spread:+.1f} to {40 + spread:+.1f})"
    assert f"| prime-seed0 | 60.0% (0.0% to 100.0%) | 10 | {gain} | 50.0% | 25.0% |" in table
    assert "| untrained | 0.0% (0.0% to 100.0%) | 10 |  |" in table


def test_a_run_is_told_in_fifths_and_one_without_a_prm_leaves_its_cells_empty():
    curve = {"rollout/responses": [600.0] * 5, "rollout/tokens": [1000.0] * 5, "rollout/accuracy": [0.1, 0.2] * 5}
    judged = {"prm/accuracy": [0.5, 0.6, 0.7, 0.8, 0.9], "process/advantage_share": [0.0, 0.02, 0.04, 0.03, 0.01]}
    judged |= {"process/accuracy": [0.4] * 5}
    stage = {"stage": "rl", "seed": 1, "seconds": 2000.4}
    table = word_problems_summary.summary(
        [stage | {"method": "rloo", "curve": curve}, stage | {"method": "prime", "curve": curve | judged}]
    )
    cost = "| 3,000 | 5,000 | 2,000 |"
    known = f"50.0%, 60.0%, 70.0%, 80.0%, 90.0% | {', '.join(['40.0%'] * 5)} | 0.0%, 2.0%, 4.0%, 3.0%, 1.0% "
    assert f"| rloo, seed 1 | {', '.join(['15.0%'] * 5)} |  |  |  {cost}" in table
    assert f"| prime, seed 1 | {', '.join(['15.0%'] * 5)} | {known}{cost}" in table


def test_a_stage_of_an_older_evaluation_leaves_its_cells_empty():
    result = {"title": "SVAMP", "problems": 1, "metrics": {"accuracy": 0.0}, "interval": {"accuracy": [0, 1]}}
    old = {"stage": "eval", "model": "prime-seed0", "result": result}
    new = old | {"model": "warm", "parts": {"few": 0.5}, "right": [0.0]}
    assert "| prime-seed0 | 0.0% (0.0% to 100.0%) | 1 |  |  |" in word_problems_summary.summary([old, new])


def test_other_problems_and_another_warm_start_make_another_run(small, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(word_problems, "once", lambda out, key, run: done.append(key["settings"]))
    monkeypatch.setattr(word_problems, "summary", lambda stages: "")
    (tmp_path / "warm" / "policy").mkdir(parents=True)
    for warm, rows in (("{}", [{"problem": "2"}]), ("{}", [{"problem": "3"}]), ("[]", [{"problem": "2"}])) * 2:
        (tmp_path / "warm" / "policy" / "config.json").write_text(warm)
        teach.write(tmp_path / "train.jsonl", rows)
        word_problems.main(["rl", *small, "--out", str(tmp_path)])
    assert done[:3] == done[3:]
    assert len(set(done)) == 3


def test_models_that_changed_are_asked_and_judged_again(small, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(word_problems, "once", lambda out, key, run: done.append(key))
    monkeypatch.setattr(word_problems, "summary", lambda stages: "")
    folders = [tmp_path / "warm" / "policy", tmp_path / "prime-seed0" / "policy", tmp_path / "prime-seed0" / "prm"]
    for folder in folders:
        folder.mkdir(parents=True)
    for changed in (None, *folders):
        if changed:
            (changed / "config.json").write_text("{}")
        for stage in ("eval", "credit"):
            word_problems.main([stage, *small, "--out", str(tmp_path)])
    asked = {name: [key["settings"] for key in done if key.get("model") == name] for name in ("untrained", "warm")}
    assert len(set(asked["untrained"])) == 1
    assert len(set(asked["warm"])) == 2
    assert len({key["settings"] for key in done if key["stage"] == "credit"}) == 4
