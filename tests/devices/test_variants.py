"""Adapters, offload and bfloat16 under sharding strategies: two iterations on two processes and on one."""

import math
import shutil

import pytest
import ranks
import torch

TOLERANCE = {"lora": 1e-5, "offload": 1e-5, "bf16": 0.1}  # relative to 1 + |x|; measured 2.4e-7, 4.6e-7 and 0.07
EXACT = ("loss", "grad_norm", "entropy", "ce")  # in bfloat16, differences of small numbers are noise
SCENES = ["lora:zero3", "lora:fsdp2", "offload:zero3", "bf16:zero3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm_model, model_folder):
    folder = tmp_path_factory.mktemp("variants")
    shutil.copytree(warm_model, folder / "policy")
    shutil.copytree(model_folder, folder / "prm")
    for option in TOLERANCE:
        ranks.run(folder, f"variant:{option}:one")
    ranks.finish(folder, ranks.launch(folder, *(f"variant:{scene}" for scene in SCENES)))
    return folder


@pytest.mark.parametrize("scene", SCENES)
def test_options_train_alike_on_one_process_and_on_two(folder, scene):
    option = scene.split(":")[0]
    one, two = (torch.load(folder / f"variant:{name}.pt") for name in (f"{option}:one", scene))
    assert len(one) == len(two) == 2
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        names = [name for name in row if option != "bf16" or name.endswith(EXACT)]
        apart = max(abs(row[name] - other[name]) / (1 + abs(row[name])) for name in names)
        assert math.isfinite(apart)
        assert apart < TOLERANCE[option], scene
