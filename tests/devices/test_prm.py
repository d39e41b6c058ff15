"""A PRM offline on two processes: it trains and validates as on one, and a model that nobody placed is refused."""

import shutil
import sys
from pathlib import Path

import launching
import pytest
import ranks
import torch
from toys import write_jsonl

sys.path.insert(0, str(Path(__file__).parents[1] / "prm"))
from prm_rows import labelled_rows

pytestmark = pytest.mark.timeout(600)
STRATEGIES = ["ddp", "fsdp2", "zero3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder, sharp_folder):
    folder = tmp_path_factory.mktemp("prm_ranks")
    shutil.copytree(model_folder, folder / "prm")
    shutil.copytree(sharp_folder, folder / "policy")
    write_jsonl(folder / "labelled.jsonl", labelled_rows(problems=60))
    write_jsonl(folder / "held_out.jsonl", labelled_rows(problems=17, seed=1))  # 9 and 8 prompts, in batches of 8
    ranks.run(folder, "prm:one")
    launching.finish(folder, ranks.launch(folder, *(f"prm:{name}" for name in STRATEGIES)))
    return folder


def ran(folder, scene):
    return torch.load(folder / f"prm:{scene}.pt")


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_train_the_model_of_one(folder, name):
    one, two = ran(folder, "one"), ran(folder, name)
    [alone], of_ranks = one["weights"], two["weights"]
    for weight_name, weight in alone.items():
        for rank in of_ranks:
            torch.testing.assert_close(rank[weight_name], weight, rtol=1e-5, atol=1e-6)
    losses = [[row["loss"] for row in found["rows"] if "loss" in row] for found in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_validation_with_a_batch_more_on_one_rank_ends_and_measures_each_prompt_once(folder, name):
    one, two = ran(folder, "one"), ran(folder, name)
    assert two["batches"] == [2, 2]
    assert two["validated"] == pytest.approx(one["validated"], rel=1e-4)


def test_a_model_that_nobody_placed_is_refused(folder):
    launching.finish(folder, ranks.launch(folder, "loose"))
    for rank in range(2):
        assert "by the strategy's `place`, got" in (folder / f"loose{rank}.txt").read_text()
