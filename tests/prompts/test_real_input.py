"""Rows of GSM8K and MATH through the whole pipeline: chat template, system prompt, verified labels, checkpoint, resume.

The model is tiny and random, and so its answers are wrong; what is shown is that nothing on the way is a stub.
"""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from prime_lightning.__main__ import main

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("PRIME_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
OWN = [
    {"problem": f"A farmer has {a} hens and buys {b} more. How many hens are there?", "answer": str(a + b)}
    for a, b in ((3, 4), (10, 5), (7, 9), (21, 2), (6, 6), (8, 13))
]


def rows(name, count=12):
    """Rows of a published data set where a copy is at hand, of our own otherwise."""
    path = DATA / name
    if not path.is_file():
        return OWN
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


@pytest.mark.parametrize("source", ["gsm8k_train.jsonl.gz", "math_train.jsonl.gz"])
def test_two_iterations_checkpoint_and_resume(source, chat_model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({k: str(row[k]) for k in ("problem", "answer")}) + "\n" for row in rows(source)))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        json.dumps(
            {
                "trainer": {"default_root_dir": str(tmp_path), "max_steps": 2},
                "model": {
                    "policy": str(chat_model),
                    "policy_update": {"minibatches": 1},
                    "prm_update": {"minibatches": 1},
                },
                "data": {
                    "train": {
                        "class_path": "prime_lightning.prompts.DatasetPrompts",
                        "init_args": {"path": str(path), "template": {"system": "Reason step by step."}},
                    },
                    "validation": None,
                    "engine": {"class_path": "prime_lightning.engines.hf.HFEngine", "init_args": {"batch_size": 16}},
                    "sampling": {"samples": 2, "max_tokens": 12},
                    "prompts_per_batch": 4,
                    "accuracy_filter": {"low": 0.0, "high": 1.0},
                },
            }
        )
    )

    def fit(*more):
        configs = [f"--config={REPOSITORY}/conf/{name}" for name in ("prime.yaml", "strategy/cpu.yaml")]
        every = f"--config={overlay}"
        last = "--trainer.callbacks.every_n_train_steps=1"
        return main(["fit", *configs, every, last, *more])

    assert fit() == 0
    log = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    assert len(log) == 2 * 4 * 2
    answers = {row["answer"] for row in rows(source)}
    for row in log:
        assert row["prompt"].startswith("<|system|>Reason step by step.<|end|><|user|>")
        assert row["prompt"].endswith("Your answer}<|end|><|assistant|>")
        assert row["verdict"] in ("correct", "wrong")  # by the real verifier; a random model writes no box
        assert row["answer"] in answers
        assert len(row["tokens"]) == len(row["process_reward"]) == len(row["advantage"])
    assert fit("--trainer.max_steps=3", f"--ckpt_path={tmp_path}/checkpoints/last.ckpt") == 0
    log = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    assert sorted({row["iteration"] for row in log}) == [0, 1, 2]
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert (tmp_path / "policy" / "model.safetensors").is_file()
    assert (tmp_path / "prm" / "tokenizer.json").is_file()
