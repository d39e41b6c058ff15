"""The same twenty iterations on one process and on two, under each strategy."""

import shutil

import pytest
import ranks
import torch

STRATEGIES = ["ddp", "fsdp2"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm_model, model_folder):
    folder = tmp_path_factory.mktemp("devices")
    shutil.copytree(warm_model, folder / "policy")
    shutil.copytree(model_folder, folder / "prm")
    ranks.train(folder, "one")
    ranks.finish(ranks.launch(folder, *STRATEGIES))
    return folder


def load(folder, name):
    return torch.load(folder / f"{name}.pt")


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_train_as_one(folder, name):
    one, two = load(folder, "one"), load(folder, name)
    assert one["weights"].keys() == two["weights"].keys()
    weights = max(float((w - two["weights"][n]).abs().max()) for n, w in one["weights"].items())
    measures = 0.0
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row.keys() == other.keys()
        measures = max([measures, *(abs(row[k] - other[k]) / (1 + abs(row[k])) for k in row)])
    print(f"{name}: greatest difference after {len(one['rows'])} iterations: weights {weights:.1e}, {measures:.1e}")
    assert weights < TOLERANCE
    assert measures < TOLERANCE


def test_ranks_take_disjoint_prompts_in_the_order_of_one_process(folder):
    one, two = load(folder, "one")["draws"][0], load(folder, "ddp")["draws"]
    for batch, parts in zip(one, zip(*two, strict=True), strict=True):
        assert not set(parts[0]) & set(parts[1])
        assert sorted(batch) == sorted([*parts[0], *parts[1]])
