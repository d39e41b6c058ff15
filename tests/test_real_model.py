"""A real model through the product: it trains on word problems, resumes, is exported, scored and reported."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from real_model import PROBLEMS, smollm2
from toys import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from prime_lightning.__main__ import main
from prime_lightning.evaluation.resources import resource

LAYERS = ["prime.yaml", "model/smollm2-135m.yaml", "data/word_problems.yaml", "strategy/cpu.yaml"]
STEPS = "First, add 34 and 49: 34 + 49 = 83.\nThe answer is \\boxed{83}."


@pytest.fixture(scope="session")
def model():
    return smollm2()


def layer(folder, rows):
    """Two iterations of eight short answers, in float32, with a gate that lets the process reward count at once."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "csv"},
    }
    saved = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    callbacks = [
        {"class_path": "prime_lightning.training.callbacks.RolloutLog", "init_args": {"folder": str(folder)}},
        {
            "class_path": "prime_lightning.training.callbacks.HuggingFaceExport",
            "init_args": {"folder": str(folder), "roles": ["policy", "prm"]},
        },
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saved},
    ]
    gate = {"after": 0, "max_ce": None, "min_accuracy": 0.0, "ramp": 1}
    problems = {"init_args": {"path": str(rows), "kind": "real_model.even_length"}}
    return {
        "trainer": {
            "default_root_dir": str(folder),
            "precision": "32-true",
            "val_check_interval": 100,
            "logger": [logger],
            "callbacks": callbacks,
        },
        "model": {"gate": {"class_path": "prime_lightning.algorithms.ProcessGate", "init_args": gate}},
        "data": {
            "train": problems,
            "validation": problems,
            "validation_prompts": 1,
            "sampling": {"samples": 4, "max_tokens": 12},
            "prompts_per_batch": 2,
            "accuracy_filter": {"low": 0.0, "high": 1.0},
        },
    }


def fit(model, folder, steps, *more):
    """Train on the four problems; the folder."""
    folder.mkdir(exist_ok=True)
    rows = [{"problem": problem, "answer": "1"} for problem in PROBLEMS]
    file = folder / "layer.yaml"
    file.write_text(json.dumps(layer(folder, write_jsonl(folder / "rows.jsonl", rows))))
    words = [word for name in LAYERS for word in ("--config", str(resource("conf", name)))]
    words += ["--config", str(file), "--model.policy", model, "--trainer.max_steps", str(steps)]
    assert main(["fit", *words, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = fit(model, tmp_path_factory.mktemp("run"), 2)
    yield folder
    shutil.rmtree(folder)  # gigabytes


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def metrics(folder):
    files = sorted((folder / "csv").glob("version_*/metrics.csv"))
    return [row for file in files for row in csv.DictReader(file.open())]


def test_both_models_learn_and_engine_and_trainer_agree(run, model):
    rows = metrics(run)
    assert [row["step"] for row in rows] == ["0", "1"]
    assert all(float(row["importance/abs_diff"]) < 1e-3 for row in rows)
    before = weights(model)
    for role in ("policy", "prm"):
        assert any(not torch.equal(before[name], value) for name, value in weights(run / role).items())


def test_a_run_that_goes_on_from_its_first_iteration_is_bit_equal(run, model, tmp_path):
    folder = fit(model, tmp_path / "run", 2, "--ckpt_path", str(run / "checkpoints" / "step=1.ckpt"))
    assert [row["step"] for row in metrics(folder)] == ["1"]
    for role in ("policy", "prm"):
        whole, resumed = weights(run / role), weights(folder / role)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    shutil.rmtree(folder)


def test_an_exported_policy_answers_as_the_runs_own_and_keeps_its_embeddings_tied(run, tmp_path):
    ckpt, out = run / "checkpoints" / "step=2.ckpt", tmp_path / "policy"
    assert main(["export", "--ckpt", str(ckpt), "--role", "policy", "--out", str(out)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    given = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBLEMS[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answers = []
    for folder in (out, run / "policy"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        answers.append(loaded.generate(**given, max_new_tokens=8, do_sample=False))
    assert torch.equal(*answers)


def slow_rewards(prm, reference, prompt, response):
    """Beta times the log-ratio of each token, by one forward pass of each model."""
    tokenizer = AutoTokenizer.from_pretrained(prm)
    head = tokenizer(prompt)["input_ids"]
    tail = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = []
    for folder in (prm, reference):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            table = loaded(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].log_softmax(-1)
        found.append(table.gather(1, torch.tensor(tail)[:, None])[:, 0])
    return 0.5 * (found[0] - found[1])


def test_an_answer_of_two_lines_has_two_step_rewards_that_add_up(run, model, tmp_path):
    prompt = json.loads((run / "rollouts.jsonl").open().readline())["prompt"]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, "response": STEPS}])
    words = ["--prm.folder", str(run / "prm"), "--input", str(rows), "--out", str(tmp_path / "scored.jsonl")]
    assert main(["score", *words]) == 0
    scored = json.loads((tmp_path / "scored.jsonl").read_text())
    expected = slow_rewards(run / "prm", model, prompt, STEPS)
    assert scored["token_rewards"] == pytest.approx(expected.tolist(), abs=1e-4)
    first, second = scored["step_texts"]
    assert first + second == STEPS
    assert first.endswith("\n")
    count = len(AutoTokenizer.from_pretrained(run / "prm")(first, add_special_tokens=False)["input_ids"])
    sums = [float(expected[:count].sum()), float(expected[count:].sum())]
    assert scored["step_rewards"] == pytest.approx(sums, abs=1e-4)
    assert scored["reward"] == pytest.approx(sum(sums), abs=1e-4)


def test_the_report_shows_its_answers(run, tmp_path):
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    page = Path(tmp_path / "report.html").read_text()
    assert "Bryan has 56 books" in page
