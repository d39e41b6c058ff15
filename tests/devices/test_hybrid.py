"""Four ranks that keep two copies of each model, each spread over two: they train as one process does."""

import math
import shutil

import launching
import pytest
import ranks
import torch
from torch.distributed.tensor import Replicate, Shard

from prime_lightning.training.strategies.checkpoint import role_weights
from prime_lightning.training.strategies.placement import copies_of

pytestmark = pytest.mark.timeout(700)
SCENES = ["variant:four:fsdp2", "variant:four:hsdp2", "refused:hsdp3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm_model, model_folder):
    folder = tmp_path_factory.mktemp("hybrid")
    shutil.copytree(warm_model, folder / "policy")
    shutil.copytree(model_folder, folder / "prm")
    ranks.run(folder, "variant:four:one")
    launching.finish(folder, ranks.launch(folder, *SCENES, world=4), seconds=500)
    return folder


def ran(folder, name):
    return torch.load(folder / f"variant:four:{name}.pt")


@pytest.mark.parametrize("name", ["fsdp2", "hsdp2"])
def test_four_ranks_train_and_save_as_one_process(folder, name):
    one, four = ran(folder, "one")["rows"], ran(folder, name)["rows"]
    assert len(one) == len(four) == 2
    for row, other in zip(one, four, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5, nan_ok=True)
    for role in ("policy", "prm"):
        saved, again = (dict(role_weights(folder / f"variant:four:{n}" / "atstep=2.ckpt", role)) for n in ("one", name))
        assert saved.keys() == again.keys()
        apart = max(float((saved[weight] - again[weight]).abs().max()) for weight in saved)
        print(f"{name} {role}: {apart:.1e}")
        assert apart < 1e-6


def test_copies_are_spread_over_two_ranks_each(folder):
    assert ran(folder, "hsdp2")["facts"]["placements"] == {(Replicate(), Shard(0))}
    assert ran(folder, "fsdp2")["facts"]["placements"] == {(Shard(0),)}


@pytest.mark.parametrize("name", ["fsdp2", "hsdp2"])
def test_four_ranks_resume_bit_equal(folder, name):
    found = ran(folder, name)
    [again], [_, row] = found["again"], found["rows"]
    assert again.keys() == row.keys()
    assert all(again[key] == row[key] or math.isnan(row[key]) for key in row)


def test_ranks_that_cannot_be_dealt_out_are_refused_on_all_of_them(folder):
    told = {(folder / f"refused:hsdp3:{rank}.txt").read_text() for rank in range(4)}
    assert told == {
        "Expected the strategy's `replicas` to be `nodes` or to divide the number of ranks, got 3 and 4 ranks."
    }
    assert copies_of("nodes", nodes=2, ranks=16) == 2
    assert copies_of(1, nodes=2, ranks=16) == 1
    for wrong in (0, -2, "node"):
        with pytest.raises(ValueError, match="to be `nodes` or to divide"):
            copies_of(wrong, nodes=2, ranks=16)
