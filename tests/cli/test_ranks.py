"""`prime_lightning.train` on two ranks, started by Lightning itself and by torchrun: the run of one rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prime_lightning.prompts.arithmetic import write_model

SCRIPT = str(Path(__file__).with_name("call_ranks.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """Run the script; the folder of its run, and what it printed."""
    place = tmp_path_factory.mktemp("ranks")
    model = write_model(place / "init", seed=0)

    def of(name, ranks, *launcher):
        words = [sys.executable, *launcher, SCRIPT, str(model), str(place / name), str(ranks)]
        ended = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
        return place / name, ended.stdout

    return of


@pytest.fixture(scope="module")
def alone(called):
    return called("alone", 1)[0]


def answers(folder):
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    return sorted((row["iteration"], row["prompt"], row["completion"], row["score"]) for row in map(json.loads, lines))


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["lightning", "torchrun"])
def test_train_on_two_ranks_is_train_on_one(launcher, called, alone):
    name = "torchrun" if launcher else "lightning"
    folder, said = called(name, 2, *launcher)
    assert sorted(line for line in said.splitlines() if line.startswith("rank ")) == [
        f"rank {rank} has Run({str(folder)!r})" for rank in (0, 1)
    ]
    logged, there = answers(folder), answers(alone)
    assert len(logged) == len(there) / 2  # the first rank's
    assert set(logged) < set(there)
    one, two = (AutoModelForCausalLM.from_pretrained(each / "policy").state_dict() for each in (alone, folder))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6
    start = AutoModelForCausalLM.from_pretrained(folder.parent / "init").state_dict()
    assert any(not torch.equal(start[key], two[key]) for key in two)
