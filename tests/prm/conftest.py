"""Labelled responses, a PRM trained on them by the command, and a PRIME run, each made once."""

import json

import pytest
from prm_rows import CONF, labelled_rows, train_prm

from prime_lightning.__main__ import main


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows()))
    return str(path)


@pytest.fixture(scope="session")
def prm_run(tmp_path_factory, warm_model, labelled):
    """The folder of a run of `prime-lightning prm`."""
    out = tmp_path_factory.mktemp("prm")
    assert train_prm(out, warm_model, labelled, "--trainer.max_epochs=4", "--data.validation_share=0.1") == 0
    return out


@pytest.fixture(scope="session")
def prime_run(tmp_path_factory, warm_model):
    """The folder of a short PRIME run, whose reference was the policy of each iteration."""
    out = tmp_path_factory.mktemp("prime")
    where = ("--trainer.default_root_dir", str(out), "--model.policy", str(warm_model), "--trainer.max_steps=10")
    small = ("--data.prompts_per_batch=4", "--data.sampling.max_tokens=8", "--data.train.init_args.operations=2",
             "--data.accuracy_filter={low: 0, high: 1}")  # fmt: skip
    assert main(["fit", "--config", str(CONF / "quickstart.yaml"), *where, *small]) == 0
    return out
