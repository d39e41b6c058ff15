"""The benchmark of collectives runs, on a small scale, and what it counts is what training is said to take."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import collectives


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_heads_are_gathered_once_a_forward_and_eleven_passes_make_an_iteration(tmp_path, capsys):
    out = tmp_path / "found.json"
    small = ["--size", "1", "--turns", "1", "--iterations", "1", "--prompts", "4", "--long", "40", "--short", "6"]
    collectives.main([*small, "--chunk_tokens", "8", "--out", str(out)])
    found = json.loads(out.read_text())
    for name in collectives.STRATEGIES:
        first, second = found[name]["counts"]
        assert first["collectives"] == second["collectives"] > 0
        for role in ("policy", "prm", "reference"):
            assert first[f"{role} head calls"] == second[f"{role} head calls"] == first[f"{role} forwards"]
            if name == "zero3":  # in the backward pass, too, where the weight was let go in between
                gathers = first[f"{role} head gathers"]
                assert gathers == second[f"{role} head gathers"]
                assert 0 < gathers <= first[f"{role} forwards"] * (1 if role == "reference" else 2)
        # scores of policy, reference and PRM, and two updates with activations computed again; a little more where
        # a rank without rows of a minibatch takes part by a row of two tokens
        assert found[name]["forward_units"][0] == pytest.approx(1 + 1 + 1 + 4 + 4, abs=0.1)
    assert "ZeRO-3 over DDP" in capsys.readouterr().out
