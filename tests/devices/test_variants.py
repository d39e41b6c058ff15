"""Options under sharding strategies: two iterations on two processes and on one, and resumed after the first."""

import math
import shutil

import launching
import pytest
import ranks
import torch

from prime_lightning.models.pretrained import load_causal_lm

pytestmark = pytest.mark.timeout(1200)  # one launch for all of it
OPTIONS = ["lora", "offload", "bf16", "still", "roles", "nan", "packed", "shared"]
EXACT = ("loss", "grad_norm", "entropy", "ce")  # in bfloat16, differences of small numbers are noise
SCENES = [
    "lora:zero3", "lora:fsdp2", "offload:zero3", "bf16:zero3", "bf16:zero1", "still:zero3", "roles:zero3",
    "nan:zero2", "nan:zero3", "nan:fsdp2", "packed:zero3", "packed:fsdp2",
    "shared:ddp",
]  # fmt: skip
SUMS = [f"sums:zero{stage}:float32" for stage in (1, 2, 3)] + ["sums:zero2:bfloat16"]
EXPORTS = ["export:none", "export:before"]
SPOILT = ["spoilt:fsdp2", "spoilt:zero3"]
TOLERANCE = {"bf16": 0.05}  # relative to 1 + |x|; others 1e-5. docs/scaling.md has what was measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm_model, model_folder):
    folder = tmp_path_factory.mktemp("variants")
    shutil.copytree(warm_model, folder / "policy")
    shutil.copytree(model_folder, folder / "prm")
    for option in OPTIONS:
        ranks.run(folder, f"variant:{option}:one")
    launching.finish(folder, ranks.launch(folder, *(f"variant:{scene}" for scene in SCENES), *SUMS, *EXPORTS, *SPOILT))
    return folder


def ran(folder, scene):
    return torch.load(folder / f"variant:{scene}.pt")


@pytest.mark.parametrize("scene", SCENES)
def test_options_train_alike_on_one_process_and_on_two(folder, scene):
    option = scene.split(":")[0]
    one, two = ran(folder, f"{option}:one")["rows"], ran(folder, scene)["rows"]
    assert len(one) == len(two) == 2
    apart = [0.0]
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        names = [name for name in row if option != "bf16" or name.endswith(EXACT)]
        same = [name for name in names if not (math.isnan(row[name]) and math.isnan(other[name]))]
        apart += [abs(row[name] - other[name]) / (1 + abs(row[name])) for name in same]
    print(f"{scene}: {max(apart):.1e}")
    assert all(x < TOLERANCE.get(option, 1e-5) for x in apart)  # NaN is not


@pytest.mark.parametrize("scene", [scene for scene in SCENES if "nan" not in scene])
def test_options_resume_bit_equal(folder, scene):
    found = ran(folder, scene)
    [again], [_, row] = found["again"], found["rows"]
    assert again.keys() == row.keys()
    assert all(again[name] == row[name] or math.isnan(row[name]) for name in row)


@pytest.mark.parametrize("scene", [scene for scene in SCENES if "nan" in scene])
def test_nan_on_one_rank_skips_the_step_on_all(folder, scene):
    """The rows are those of one process; here, that it did happen, and that training went on."""
    first, second = ran(folder, scene)["rows"]
    assert first["policy/skipped_steps"] == 1
    assert second["policy/skipped_steps"] == 0
    assert second["policy/grad_norm"] > 0


def test_one_model_may_be_laid_out_otherwise(folder):
    facts = ran(folder, "roles:zero3")["facts"]
    assert facts["stages"] == {"policy": 3, "prm": 1}
    assert facts["reference_is_whole"]  # replicated
    facts = ran(folder, "bf16:zero3")["facts"]
    assert facts["stages"] == {"policy": 3, "prm": 3, "reference": 3}
    assert not facts["reference_is_whole"]


def test_rotary_frequencies_stay_float32(folder):
    assert ran(folder, "bf16:zero3")["facts"]["frequencies_off"] == 0


def test_a_checkpoint_is_validated_without_a_fit(folder):
    one, two = (ran(folder, f"still:{name}")["facts"]["validated"] for name in ("one", "zero3"))
    assert one["val/pass1"] == two["val/pass1"] > 0


@pytest.mark.parametrize("scene", SUMS)
def test_gradients_of_many_micro_batches_add_up(folder, scene):
    lost = scene.endswith("bfloat16")  # 1 + 2^-9 is 1 there
    assert torch.load(folder / f"{scene}.pt") == [1.0 if lost else 1.0 + 256 * 2.0**-9]


@pytest.mark.parametrize("scene", SPOILT)
def test_the_wrong_engine_of_one_rank_ends_all_of_them(folder, scene):
    first, second = ((folder / f"{scene}:{rank}.txt").read_text() for rank in range(2))
    assert first == f"Rank 1: {second}"
    assert "asked greedily" in second


@pytest.mark.parametrize("scene", EXPORTS)
def test_fsdp2_gathers_nothing_for_longer_than_a_pass_and_exports_float32_weights(folder, scene):
    found = torch.load(folder / f"{scene}.pt")
    assert found["gathered"] == []
    written = load_causal_lm(str(folder / scene / "prm")).state_dict()
    masters = {n.removeprefix("prm.model."): w for n, w in found["weights"].items() if n.startswith("prm.")}
    assert written.keys() == masters.keys() >= {"lm_head.weight", "model.embed_tokens.weight"}
    assert all(torch.equal(written[name], weight) for name, weight in masters.items())
    rounded = [name for name, weight in masters.items() if torch.equal(weight, weight.bfloat16().float())]
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(rounded)  # or the test would prove nothing
