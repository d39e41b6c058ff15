"""The benchmark of training runs, small and without its peer, and its ratios are those of its parts."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.prompts.arithmetic import write_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import training

BENCHMARKS = Path(training.__file__).parent
SMALL = ["--rollouts", "4", "--samples", "2", "--iterations", "1", "--turns", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model"), hidden_size=32, layers=1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_arms_train_on_all_tokens_and_ratios_are_those_of_the_arms(model, tmp_path, capsys):
    out = tmp_path / "found.json"
    training.main([*SMALL, "--model", model, "--arms", "rloo", "floor_rloo", "--out", str(out)])
    found = json.loads(out.read_text())
    (one,) = found["settings"]
    arms, ratios = one["arms"], one["ratios"]
    assert set(arms) == {"rloo", "floor_rloo"}
    assert {arm["answer_tokens"] for arm in arms.values()} == {4 * 64}
    assert list(ratios) == ["training: rloo / floor_rloo"]
    (ratio,) = ratios.values()
    assert math.isfinite(ratio)
    assert ratio == pytest.approx(arms["rloo"]["seconds"]["training"] / arms["floor_rloo"]["seconds"]["training"])
    told = f"| training: rloo / floor_rloo | {ratio:.2f} |"
    assert told in capsys.readouterr().out
    training.main(["--markdown", str(tmp_path / "page.md"), str(out), str(out)])
    page = (tmp_path / "page.md").read_text()
    assert page.count(told) == page.count(found["machine"]) == page.count(f"torch {found['versions']['torch']}") == 2


def measured(arm, iteration, training, peak):
    return {arm: {"seconds": {"iteration": iteration, "training": training}, "peak_gib": peak, "passes": None}}


def test_growth_is_told_in_units_of_the_first_row():
    asked = vars(training.parser().parse_args(SMALL)) | {"prompt_tokens": 32, "answer_tokens": 64}
    rows = [(4, measured("rloo", 2.0, 1.0, 0.5)), (8, measured("rloo", 3.0, 2.0, 0.75))]
    found = {"vary": "rollouts", "command": "-", "machine": "-", "versions": {}}
    found["settings"] = [{"options": asked | {"rollouts": n}, "arms": arms, "load": [0.0]} for n, arms in rows]
    assert "| 8 | 3.000 (1.50) | 2.000 (2.00) | 0.750 (1.50) |" in training.table(found).splitlines()


def test_each_value_of_what_varies_is_a_setting_of_its_own():
    asked = training.parser().parse_args([*SMALL, "--vary", "answer_tokens", "16", "32"])
    assert [(one.prompt_tokens, one.answer_tokens) for one in training.settings(asked)] == [(32, 16), (32, 32)]
    with pytest.raises(SystemExit, match="the name one of rollouts, samples"):
        training.main([*SMALL, "--vary", "length", "3"])
    with pytest.raises(SystemExit, match="divisible by --samples 3"):
        training.main([*SMALL, "--vary", "samples", "2", "3"])


def test_peak_memory_is_the_programs_own_and_not_what_started_it():
    large = bytearray(b"x") * 2**29
    script = "from memory import peak_gib; small = peak_gib(); kept = bytearray(b'x') * 2**28; print(small, peak_gib())"
    words = [sys.executable, "-S", "-c", script]
    done = subprocess.run(words, cwd=BENCHMARKS / "peers", capture_output=True, text=True, check=True)
    small, more = map(float, done.stdout.split())
    assert len(large) / 2**30 == 0.5
    assert small < 0.2
    assert more - small == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("arm", ["rloo_packed", "prime", "prime_packed"])
def test_an_arm_updates_each_trained_model_once_and_its_phases_make_its_iteration(arm, model):
    asked = [*SMALL, "--model", model, "--micro_tokens", "200"]
    options = argparse.Namespace(**vars(training.parser().parse_args(asked)), prompt_tokens=32, answer_tokens=64)
    found = training.product(arm, options)
    seconds, passes = found["seconds"], found["passes"]
    trained = {"policy", "prm"} if arm.startswith("prime") else {"policy"}
    assert {name: count for name, count in passes.items() if "update" in name} == {f"{r} update": 1 for r in trained}
    assert found["answer_tokens"] == 4 * 64
    scored = {"score"} if any("forward" in name for name in passes) else set()  # one step's own pass may be all
    assert ("score" in seconds) == bool(scored)
    assert sum(seconds[phase] for phase in scored | trained) <= seconds["training"] < seconds["iteration"]
    options.passes = passes
    floor = training.floor(options)
    assert set(floor["seconds"]) == {"training", *scored, *trained}


def test_prompts_have_their_length_and_no_special_token(model):
    tokenizer = load_tokenizer(model)
    prompts = [training.Tokens(250).prompt(draw, tokenizer).token_ids for draw in range(3)]
    assert {len(prompt) for prompt in prompts} == {250}
    assert len(set(prompts)) == 3
    assert not set().union(*prompts) & set(tokenizer.all_special_ids)


def test_a_floor_asks_for_the_arm_whose_passes_it_makes():
    with pytest.raises(SystemExit, match="the arm rloo beside floor_rloo"):
        training.main([*SMALL, "--arms", "floor_rloo"])
