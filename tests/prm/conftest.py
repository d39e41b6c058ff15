"""Labelled responses, a PRM trained on them by the command, and a PRIME run, each made once."""

import json
from pathlib import Path

import numpy as np
import pytest

from prime_lightning.__main__ import main
from prime_lightning.arithmetic import DIGITS, Chains, Teacher

CONF = Path(__file__).parent.parent.parent / "conf"
CHAINS = Chains(operations=2)
ON_CPU = ("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_model_summary=false",
          "--model.loading={attention: sdpa, packed: false, gradient_checkpointing: false}")  # fmt: skip


def labelled_rows(problems=200, samples=4, seed=0):
    """Answers of the imperfect teacher, several a problem, and whether the final result is right."""
    rng, teacher = np.random.default_rng(seed), Teacher(chains=CHAINS, reliability=0.8)
    for _ in range(problems):
        problem = CHAINS.problem(rng)
        for _ in range(samples):
            response = teacher.solve(problem, rng)
            right = response.endswith("#" + DIGITS[CHAINS.results(problem)[-1]])
            yield {"prompt": problem, "response": response, "label": int(right)}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows()))
    return str(path)


def train_prm(out, model, path, *more):
    """`prime-lightning prm` on the shipped configuration, for a model this small."""
    small = ("--model.beta=0.5", "--model.step_separator=;", "--data.prompts_per_batch=8")
    rate = "--model.optimizer.init_args.lr=2e-3"
    where = (f"--trainer.default_root_dir={out}", f"--model.prm={model}", f"--data.path={path}")
    return main(["prm", "--config", str(CONF / "prm.yaml"), *ON_CPU, *small, rate, *where, *map(str, more)])


@pytest.fixture(scope="session")
def prm_run(tmp_path_factory, warm_model, labelled):
    """The folder of a run of `prime-lightning prm`."""
    out = tmp_path_factory.mktemp("prm")
    assert train_prm(out, warm_model, labelled, "--trainer.max_epochs=3", "--data.validation_share=0.2") == 0
    return out


@pytest.fixture(scope="session")
def prime_run(tmp_path_factory, warm_model):
    """The folder of a short PRIME run, whose reference was the policy of each iteration."""
    out = tmp_path_factory.mktemp("prime")
    where = ("--trainer.default_root_dir", str(out), "--model.policy", str(warm_model), "--trainer.max_steps=10")
    small = ("--data.prompts_per_batch=4", "--data.sampling.max_tokens=8", "--data.train.init_args.operations=2",
             "--data.accuracy_filter={low: 0, high: 1}", "--model.process_reward.step_separator=;")  # fmt: skip
    assert main(["fit", "--config", str(CONF / "quickstart.yaml"), *where, *small]) == 0
    return out
