"""The failure drill, short: a verifier worker, the launcher and an engine are killed, a disk is full, gradients NaN.

`benchmarks/results/drill.md` has the long one.
"""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def drill():
    sys.path.insert(0, str(BENCHMARKS))  # as where it is run as a script
    yield importlib.import_module("drill")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_struck_run_ends_with_the_weights_of_one_that_was_not(drill, warm_model, tmp_path, capsys):
    out = tmp_path / "drill"
    options = ["--out", str(out), "--iterations", "6", "--filter", "0.1", "0.9", "--model", str(warm_model)]
    assert drill.main([*options, "--kinds", "verifier", "launcher", "disk", "engine", "nan"]) == 0
    said = capsys.readouterr().out
    assert "**bit-equal to** those of the undisturbed run" in said
    assert "The gradient of the policy was not finite 5 times in a row" in said
    assert "Could not write the checkpoint" in said
    assert re.search(r"rank \d stops, because rank \d of 2 stopped: ValueError: The engine's process is gone", said)
    assert len(list((out / "struck").glob("log*.txt"))) == 5  # the verifier's death stopped nothing


def test_equal_sees_one_bit(drill):
    a = {"x": [torch.tensor([1.0, 2.0]), 3]}
    assert drill.equal(a, {"x": [torch.tensor([1.0, 2.0]), 3]})
    assert not drill.equal(a, {"x": [torch.tensor([1.0, 2.0 + 2e-7]), 3]})
    assert not drill.equal(a, {"x": [torch.tensor([1.0, 2.0])]})
