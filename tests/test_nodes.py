"""Several processes and several nodes: a rank that fails stops all of them, and the shipped launch files work.

The two nodes are two launchers on this machine that meet by its loopback address.
"""

import os
import re
import sys
import time
from pathlib import Path

import nodes_ranks
import pytest

from prime_lightning.training.strategies.watch import RankWatch

REPOSITORY = Path(__file__).parent.parent
BIN = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
OVERLAY = """
trainer:
  default_root_dir: {folder}
  accelerator: cpu
  strategy: {{class_path: prime_lightning.training.strategies.PrimeDDPStrategy}}
  max_steps: 3
  logger: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: "{folder}/checkpoints", every_n_train_steps: 1, save_last: true, save_top_k: 0}}
    {trouble}
model: {{policy: "{model}", policy_update: {{minibatches: 1}}, prm_update: {{minibatches: 1}}}}
data:
  train: {{class_path: {prompts}, init_args: {{seed: 1, operations: 2}}}}
  sampling: {{samples: 4, max_tokens: 8}}
  prompts_per_batch: 4
  check_answers: false
  accuracy_filter: {{low: 0.0, high: 1.0, min_valid: 1}}
  verifiers:
    class_path: prime_lightning.verifiers.Verifiers
    init_args: {{workers: 1, user: {{wall_seconds: 1.0}}}}
"""


def overlay(folder, model, trouble="", prompts="prime_lightning.prompts.ArithmeticPrompts"):
    """The quickstart, small, on two processes; returns the options of `fit`."""
    made = f"- class_path: nodes_ranks.Trouble\n      init_args: {{kind: {trouble}}}" if trouble else ""
    path = folder / "overlay.yaml"
    path.write_text(OVERLAY.format(folder=folder, model=model, trouble=made, prompts=prompts))
    return ["--config", str(REPOSITORY / "conf/quickstart.yaml"), "--config", str(path)]


# ---- the watch alone


def test_ranks_wait_for_each_other_at_the_end_and_miss_one_that_is_lost(tmp_path):
    port = str(nodes_ranks.free_port())
    words = [sys.executable, str(REPOSITORY / "tests/watch_ranks.py")]
    first, second = (
        nodes_ranks.started(tmp_path, words, name=str(n), RANK=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for n in range(2)
    )
    try:
        assert first.wait(60) == 2
    finally:
        second.kill()
    said = nodes_ranks.said(tmp_path)
    assert said.count("is done") == 2
    assert "prime-lightning: rank 0 stops, because rank 1 of 2 gave no sign of life for 4 s" in said
    assert "rank 0 closes" in said  # engine and verifiers


def test_a_timeout_without_time_is_refused():
    with pytest.raises(ValueError, match="Expected a `timeout` of at least 3 seconds, got 1"):
        RankWatch(timeout=1)


# ---- whole runs


def ended(process, folder, seconds=120):
    """Exit status and seconds since the trouble."""
    try:
        status = process.wait(seconds)
    finally:
        process.kill()
    said = nodes_ranks.said(folder)
    trouble = re.search(r"trouble at ([\d.]+)", said)
    assert trouble, said[-4000:]
    return status, time.time() - float(trouble[1]), said


def test_a_rank_that_raises_stops_all_under_slurm(warm_model, tmp_path):
    """The shipped job file, two nodes of one task, and an `srun` that does not kill."""
    fake = tmp_path / "bin" / "srun"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\n{(REPOSITORY / 'tests/fake_srun.py').read_text()}")
    fake.chmod(0o755)
    process = nodes_ranks.started(
        tmp_path,
        ["bash", str(REPOSITORY / "docs/cluster/job.slurm"), *overlay(tmp_path, warm_model, "raise")],
        PATH=f"{fake.parent}:{BIN}",
        SLURM_JOB_ID=str(nodes_ranks.free_port()),
        SLURM_JOB_NAME="prime",
        SLURM_NNODES="2",
        SLURM_NTASKS_PER_NODE="1",
        SLURM_NTASKS="2",
        SLURM_NODELIST="127.0.0.[1-2]",
        MASTER_PORT=str(nodes_ranks.free_port()),
    )
    status, seconds, said = ended(process, tmp_path)
    assert status != 0
    assert "prime-lightning: rank 0 stops, because rank 1 of 2 stopped: ValueError: Expected no trouble" in said
    assert "prime-lightning: Expected no trouble, got some." in said  # rank 1's own
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert seconds < 60


def test_a_rank_that_is_killed_stops_all_under_lightnings_launcher(warm_model, tmp_path):
    options = [*overlay(tmp_path, warm_model, "kill"), "--trainer.devices=2"]
    process = nodes_ranks.started(tmp_path, [sys.executable, "-m", "prime_lightning", "fit", *options])
    status, seconds, said = ended(process, tmp_path)
    assert status != 0, said
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert seconds < 60


def test_a_verifier_that_stalls_on_two_nodes_under_torchrun(warm_model, tmp_path):
    """Its verdicts are unknown, and the run goes on to its end on both nodes."""
    shipped = ["--config", str(REPOSITORY / "conf/strategy/ddp.yaml"), "--trainer.accelerator=cpu"]
    options = [*overlay(tmp_path, warm_model, prompts="nodes_ranks.Stalling"), *shipped]
    words = ["bash", str(REPOSITORY / "docs/cluster/torchrun.sh"), *options]
    shared = {"PATH": BIN, "NODES": "2", "HEAD": "127.0.0.1", "GPUS": "1", "PORT": str(nodes_ranks.free_port())}
    nodes = [nodes_ranks.started(tmp_path, words, name=str(n), NODE_RANK=str(n), **shared) for n in range(2)]
    nodes_ranks.finish(nodes, tmp_path)
    said = nodes_ranks.said(tmp_path)
    assert "`Trainer.fit` stopped: `max_steps=3` reached." in said
    assert "of verdicts are unknown" in said
