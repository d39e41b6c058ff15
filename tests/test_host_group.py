"""Objects and counts between two ranks: the same over gloo and beside another backend, which they do not touch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prime_lightning.engines.host_group import of_all_ranks


def ran(folder, backend):
    script = Path(__file__).parent / "host_ranks.py"
    processes = [
        subprocess.Popen([sys.executable, script, folder, backend], env=os.environ | {"RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{backend}{rank}.pt") for rank in range(2)]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("backend", ["gloo", "silent"])
def test_ranks_ask_one_another_over_gloo_whatever_the_default_is(tmp_path, backend):
    """The backend `silent` stands for NCCL: what went over it would not arrive."""
    first, second = ran(tmp_path, backend)
    for found in (first, second):
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["together"] == [0, 1]
        assert (found["sum"], found["max"]) == (3.0, 2.0)
        assert found["backend"] == "gloo"
        assert found["is the default"] == (backend == "gloo")
        assert found["made once"]
        assert found["timeout"]
        assert found["ended"]
    assert sorted(first["groups"] + second["groups"]) == [0, 1, 2, 3]
    assert first["groups"] == [0]  # the long one
    assert sorted(first["lengths"] + second["lengths"]) == [1, 1, 2, 2, 20, 20, 30, 30]


def test_one_process_asks_itself():
    assert of_all_ranks(3) == [3]
