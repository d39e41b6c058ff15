"""The benchmark of rollouts runs, on a small scale and without vLLM, and its ratios are those of its parts."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rollouts


def test_the_benchmark_runs_and_its_numbers_fit_together(tmp_path, capsys):
    out = tmp_path / "found.json"
    small = ["--turns", "2", "--prompts", "4", "--max_tokens", "8"]
    rollouts.main(["--engines", "hf", "--iterations", "1", "--iterate_with", "hf", *small, "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found["hf"]["tokens_per_second"]) == {"module", "engine", "bare"}
    (row,) = found["iterations"]
    assert row["sync_share"] == pytest.approx(row["sync"] / row["iteration"])
    assert row["sampling"] + row["training"] + row["sync"] == pytest.approx(row["iteration"], rel=0.5)
    within = row["overlapped"]
    assert row["overlap"] == pytest.approx(within["iteration"] / max(within["sampling"], within["training"]))
    assert "load averages" in capsys.readouterr().out
