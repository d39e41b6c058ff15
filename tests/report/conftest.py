"""One real run of a tiny model, and a page made of hostile text."""

import pytest
import tiny
from lightning.pytorch.loggers import CSVLogger

from prime_lightning.prompts.arithmetic import written_steps
from prime_lightning.training.callbacks.outputs import RolloutLog
from report.lines import HOSTILE, row, write_rollouts


@pytest.fixture(scope="session")
def run_folder(warm_model, tmp_path_factory):
    """Four iterations of PRIME, logged as the quickstart logs."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-seed0"
    callbacks = [RolloutLog(str(folder), steps=written_steps)]
    logger = CSVLogger(str(folder), name="csv", flush_logs_every_n_steps=1)
    trainer = tiny.trainer(folder, 4, logger=logger, callbacks=callbacks)
    trainer.fit(tiny.module(warm_model), tiny.data(warm_model, prompts_per_batch=8))
    return folder


@pytest.fixture(scope="session")
def hostile_folder(tmp_path_factory):
    """A run in which everything that a model or a data set can say is hostile."""
    folder = tmp_path_factory.mktemp("hostile") / "a<b>&run"
    rows = [
        row(0, i, verdict, tokens=[text, "x"], prompt=text, answer=text, source=text)
        for i, text in enumerate(HOSTILE)
        for verdict in ("correct", "wrong")
    ]
    write_rollouts(folder, rows)
    (folder / "csv" / "version_0").mkdir(parents=True)
    name = "verdict/<img src=x onerror=window.pwned=1>/correct"
    (folder / "csv" / "version_0" / "metrics.csv").write_text(f"{name},step,my/<b>x</b>\n1.0,0,1\n2.0,1,2\n3.0,2,4\n")
    (folder / "csv" / "version_0" / "config.yaml").write_text("seed_everything: 0\nmodel: {policy: '</script>'}\n")
    return folder
