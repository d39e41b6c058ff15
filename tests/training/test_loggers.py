"""What the loggers keep of a real run: CSV, TensorBoard, and W&B without a network."""

import csv
import json
import os
import subprocess
import sys

import pytest
import tiny
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prime_lightning.rollout import Completion
from prime_lightning.training.callbacks.outputs import COLUMNS, SampleTable, as_text, visible

HOSTILE = "7\n```\n<script>alert(1)</script>\x1b[2J\u202e\ud800 | x | y\r\n# head"


class Hostile(tiny.HFEngine):
    """Answers with text that tries to break out."""

    def stream(self, prompts, sampling):
        for prompt, completions in super().stream(prompts, sampling):
            fields = ("token_ids", "logprobs", "finish", "versions")
            yield prompt, [Completion(text=HOSTILE, **{f: getattr(c, f) for f in fields}) for c in completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder):
    """Two iterations under three loggers."""
    folder = tmp_path_factory.mktemp("loggers")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(folder / "cache"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        loggers = [
            CSVLogger(folder, name="csv", flush_logs_every_n_steps=1),
            TensorBoardLogger(folder, name="tensorboard"),
            WandbLogger(save_dir=folder, project="tests", log_model=False),
        ]
        trainer = tiny.trainer(folder, 2, SampleTable(rows=3, every=1), logger=loggers)
        trainer.fit(tiny.module(model_folder), tiny.data(model_folder, engine=Hostile(batch_size=32)))
        loggers[2].experiment.finish()
    return folder


def test_csv_and_tensorboard_have_the_same_numbers(run):
    with next((run / "csv").glob("version_*/metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("prm/ce")]
    events = EventAccumulator(str(run / "tensorboard" / "version_0")).Reload()
    assert [int(row["step"]) for row in rows] == [0, 1]
    for name in ("prm/ce", "rollout/length", "policy/entropy"):
        assert [float(row[name]) for row in rows] == pytest.approx([e.value for e in events.Scalars(name)], rel=1e-5)


def test_tensorboard_gets_samples_as_safe_text(run):
    events = EventAccumulator(str(run / "tensorboard" / "version_0")).Reload()
    [text, _] = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/text_summary")]
    assert text.count("iteration: 0, verdict: ") == 3
    assert "\x1b" not in text
    assert "\u202e" not in text
    for line in text.splitlines():
        assert not line or line.startswith(("    ", "iteration: 0, verdict: ")), line


def test_wandb_offline_keeps_a_table(run):
    [folder] = (run / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))
    tables = sorted(folder.glob("files/media/table/samples_*.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == COLUMNS
    assert [row[2] for row in table["data"]] == [visible(HOSTILE)] * 3


def test_a_run_that_is_started_again_is_one_run_of_wandb(tmp_path):
    """As docs/index.md says: the environment names it, for each process anew."""
    named = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_RUN_ID": "toy-1", "WANDB_RESUME": "allow"}
    around = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of this process's runs
    program = """
import sys
from lightning.pytorch.loggers import WandbLogger
logger = WandbLogger(save_dir=sys.argv[1], project="tests", log_model=False)
logger.log_metrics({"x": 1.0}, step=0)
print(logger.experiment.id)
"""
    for start in ("first", "second"):
        (tmp_path / start).mkdir()
        command = [sys.executable, "-c", program, str(tmp_path / start)]
        done = subprocess.run(command, env=around | named, capture_output=True, text=True, timeout=200, check=True)
        assert done.stdout.split()[-1] == "toy-1"
    assert len(list(tmp_path.glob("*/wandb/offline-run-*-toy-1"))) == 2


def test_hostile_text_becomes_one_block():
    text = as_text([[0, "p", visible(HOSTILE), "", "wrong", None, 3]])
    assert "completion | 7\n               | ```\n               | <script>" in text
    assert "\\x1b[2J\\u202e\\ud800 | x | y\\r\n" in text
    with pytest.raises(ValueError, match="at least 1"):
        SampleTable(rows=0)
