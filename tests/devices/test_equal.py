"""Twenty iterations on one process and on two, under each strategy; resumed under the same and under others."""

import shutil

import launching
import pytest
import ranks
import torch

from prime_lightning.__main__ import main
from prime_lightning.models.pretrained import load_causal_lm, load_tokenizer, save
from prime_lightning.training.strategies.checkpoint import role_weights

pytestmark = pytest.mark.timeout(1200)  # one launch for all of it
STRATEGIES = ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
SAME = [f"resume:{name}:{name}" for name in STRATEGIES]
OTHER = ["resume:one:zero3", "resume:zero3:fsdp2", "resume:fsdp2:zero2"]
TOLERANCE = 1e-5  # absolute for weights, relative to 1 + |x| for measures; docs/scaling.md has what was measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm_model, model_folder):
    folder = tmp_path_factory.mktemp("devices")
    shutil.copytree(warm_model, folder / "policy")
    prm = load_causal_lm(model_folder)  # smaller than the policy
    prm.config.tie_word_embeddings = True
    prm.lm_head.weight = prm.model.embed_tokens.weight
    save(prm, load_tokenizer(model_folder), folder / "prm")
    ranks.train(folder, "one")
    launching.finish(folder, ranks.launch(folder, *STRATEGIES, *SAME, *OTHER))
    ranks.resume(folder, "resume:zero2:one")
    return folder


def apart(folder, name, other):
    """Greatest differences of weights and of measures between two runs, of which the second may be the first's end."""
    one, two = torch.load(folder / f"{name}.pt"), torch.load(folder / f"{other}.pt")
    assert two["validated"]["val/pass1"] == torch.load(folder / "one.pt")["validated"]["val/pass1"] > 0
    assert two["gap"] == 0  # the engine samples from the policy's weights, whatever they are sharded by
    assert one["weights"].keys() == two["weights"].keys()
    weights = max(float((w - two["weights"][n]).abs().max()) for n, w in one["weights"].items())
    measures = 0.0
    for row, again in zip(one["rows"][-len(two["rows"]) :], two["rows"], strict=True):
        assert row.keys() == again.keys()
        measures = max([measures, *(abs(row[k] - again[k]) / (1 + abs(row[k])) for k in row)])
    print(f"{name} and {other}: weights {weights:.1e}, measures {measures:.1e}")
    return weights, measures


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_train_as_one(folder, name):
    assert max(apart(folder, "one", name)) < TOLERANCE


@pytest.mark.parametrize("scene", SAME)
def test_resume_is_bit_equal(folder, scene):
    weights, _ = apart(folder, scene.split(":")[1], scene)
    assert weights == 0


@pytest.mark.parametrize("scene", [*OTHER, "resume:zero2:one"])
def test_any_strategy_resumes_from_any_other(folder, scene):
    assert max(apart(folder, "one", scene)) < TOLERANCE


def test_ranks_take_disjoint_prompts_in_the_order_of_one_process(folder):
    one, two = (torch.load(folder / f"{name}.pt")["draws"] for name in ("one", "ddp"))
    for batch, parts in zip(one[0], zip(*two, strict=True), strict=True):
        assert not set(parts[0]) & set(parts[1])
        assert sorted(batch) == sorted([*parts[0], *parts[1]])


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_export_reads_the_checkpoint_of_any_strategy(folder, tmp_path, name):
    saved = folder / name / f"atstep={ranks.SAVED}.ckpt"
    assert main(["export", "--ckpt", str(saved), "--role", "policy", "--out", str(tmp_path / "policy")]) == 0
    written = load_causal_lm(str(tmp_path / "policy")).state_dict()
    weights = dict(role_weights(saved, "policy"))
    assert all(torch.equal(written[name], weight) for name, weight in weights.items())
    start = load_causal_lm(str(folder / "policy")).state_dict()
    assert any(not torch.equal(start[name], weight) for name, weight in weights.items())
