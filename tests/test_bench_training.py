"""The benchmark of training runs, small and without its peer, and its ratios are those of its parts."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest

from prime_lightning.arithmetic import write_model
from prime_lightning.pretrained import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import training

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
    arms, ratios = found["arms"], found["ratios"]
    assert set(arms) == {"rloo", "floor_rloo"}
    assert {arm["answer_tokens"] for arm in arms.values()} == {4 * 64}
    assert list(ratios) == ["training: rloo / floor_rloo"]
    (ratio,) = ratios.values()
    assert math.isfinite(ratio)
    assert ratio == pytest.approx(arms["rloo"]["seconds"]["training"] / arms["floor_rloo"]["seconds"]["training"])
    assert f"| training: rloo / floor_rloo | {ratio:.2f} |" in capsys.readouterr().out


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
