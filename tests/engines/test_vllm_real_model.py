"""vLLM on a CPU with a real model: its greedy answers and log-probs are those of the hf engine, and it trains."""

import csv
import json
from importlib.util import find_spec

import pytest
import torch
from real_model import PROBLEMS, smollm2

from prime_lightning.__main__ import main
from prime_lightning.engines.hf import HFEngine
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.evaluation.resources import resource
from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.prompts.dataset import DatasetPrompts
from prime_lightning.rollout import Sampling

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")

GREEDY = Sampling(samples=1, max_tokens=24, temperature=0.0)
LAYERS = ["prime.yaml", "model/smollm2-135m.yaml", "strategy/cpu.yaml", "engine/vllm.yaml"]


@pytest.fixture(scope="module")
def model():
    return smollm2()


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"problem": problem, "answer": "1"}) + "\n" for problem in PROBLEMS))
    return str(file)


def test_greedy_answers_and_logprobs_are_those_of_the_hf_engine(model, rows):
    torch.set_num_threads(1)
    prompts, tokenizer = DatasetPrompts(rows, shuffle=False), load_tokenizer(model)
    asked = [prompts.prompt(draw, tokenizer) for draw in range(len(PROBLEMS))]
    found = []
    for engine in (HFEngine(device="cpu"), VLLMEngine(device="cpu", max_model_len=512)):
        engine.start(model)
        found.append({prompt.draw: group[0] for prompt, group in engine.stream(asked, GREEDY)})
        engine.close()
    for draw, one in found[0].items():
        other = found[1][draw]
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-3)


def test_it_trains_on_what_vllm_samples_with_the_weights_of_each_iteration(model, rows, tmp_path):
    train = {
        "class_path": "prime_lightning.prompts.DatasetPrompts",
        "init_args": {"path": rows, "kind": "real_model.even_length"},
    }
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path), "name": "csv"},
    }
    layer = {
        "trainer": {
            "default_root_dir": str(tmp_path), "precision": "32-true", "max_steps": 2, "val_check_interval": 100,
            "callbacks": [], "logger": [logger], "enable_checkpointing": False,
        },
        "model": {"policy": model, "prm": None, "probe": {"every": 1}},
        "data": {
            "train": train,
            "validation": train,
            "validation_prompts": 1,
            "engine": {"init_args": {"device": "cpu", "max_model_len": 512}},
            "sampling": {"samples": 4, "max_tokens": 12},
            "prompts_per_batch": 2,
            "accuracy_filter": {"low": 0.0, "high": 1.0},
        },
    }  # fmt: skip
    file = tmp_path / "layer.yaml"
    file.write_text(json.dumps(layer))
    words = [word for name in LAYERS for word in ("--config", str(resource("conf", name)))]
    assert main(["fit", *words, "--config", str(file)]) == 0
    rows = list(csv.DictReader((tmp_path / "csv" / "version_0" / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1"]
    assert all(float(row["importance/abs_diff"]) < 1e-3 for row in rows)
