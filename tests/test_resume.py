"""A run that is stopped, or killed, and resumed is bit-equal to one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import lightning.pytorch as pl
import pytest
import tiny
import torch

from prime_lightning import algorithms as alg
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.training.options import ProcessReward, Replaying

STEPS = 6


def pieces(model, prime_options=None):
    """A run with everything that has state: gate, replay, schedules, surplus groups, two optimizers."""
    prime = tiny.module(
        model,
        gate=alg.ProcessGate(after=1, max_ce=None, min_accuracy=0.0, ramp=3),
        process_reward=ProcessReward(beta=0.5, replay=Replaying(iterations=2)),
        schedule=lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
        **(prime_options or {}),
    )
    rollouts = tiny.data(
        model,
        accuracy_filter=AccuracyFilter(low=0.1, high=0.9),
        oversample=3.0,
        surplus="keep",
        patience=1000,
        engine=tiny.Backwards(batch_size=32),
    )
    return prime, rollouts


def state(trainer):
    module = trainer.lightning_module
    return {
        "weights": dict(module.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "gate": module.gate.state_dict(),
        "replay": module.prm_learner.replay.state_dict(),
        "position": trainer.train_dataloader.state_dict(),
    }


def assert_equal(a, b, where=""):
    """Bit-equal, whatever is nested in whatever."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} and {b}"  # NaN equals NaN here


@pytest.fixture(scope="module")
def whole(warm_model, tmp_path_factory):
    """The undisturbed run, with a checkpoint of each iteration."""
    folder = tmp_path_factory.mktemp("whole")
    save = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    history = tiny.History()
    trainer = tiny.trainer(folder, STEPS, save, history=history)
    trainer.fit(*pieces(warm_model))
    return folder, trainer, history


@pytest.mark.parametrize("stopped_after", [1, 3, 5])
def test_resuming_anywhere_is_bit_equal(whole, warm_model, tmp_path, stopped_after):
    folder, undisturbed, expected = whole
    history = tiny.History()
    trainer = tiny.trainer(tmp_path, STEPS, history=history)
    trainer.fit(*pieces(warm_model), ckpt_path=folder / f"step={stopped_after}.ckpt")
    assert_equal(history.rows, expected.rows[stopped_after:])  # every logged number, prompts and rewards among them
    assert_equal(state(trainer), state(undisturbed))
    texts = [[r.completion.text for r in out.batch.rollouts] for out in history.outputs]
    assert texts == [[r.completion.text for r in out.batch.rollouts] for out in expected.outputs[stopped_after:]]


def test_the_whole_run_is_repeatable(whole, warm_model, tmp_path):
    _, undisturbed, expected = whole
    history = tiny.History()
    trainer = tiny.trainer(tmp_path, STEPS, history=history)
    trainer.fit(*pieces(warm_model))
    assert_equal(history.rows, expected.rows)
    assert_equal(state(trainer), state(undisturbed))


def test_surplus_groups_are_trained_on_once(whole):
    """With oversampling, every accepted group is used exactly once, one iteration late at most."""
    _, _, history = whole
    draws = [r.prompt.draw for out in history.outputs for r in out.batch.rollouts[::4]]
    assert len(draws) == len(set(draws))
    assert any(row["rollout/surplus_groups"] > 0 for row in history.rows)
    assert any(row["rollout/policy_lag"] > 0 for row in history.rows)


def test_the_reference_is_not_in_the_checkpoint(warm_model, tmp_path):
    prime, rollouts = pieces(warm_model, {"reference": str(warm_model)})
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(prime, rollouts)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    names = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("reference.") for name in names)
    prime, rollouts = pieces(warm_model, {"reference": str(warm_model)})
    tiny.trainer(tmp_path, 2).fit(prime, rollouts, ckpt_path=tmp_path / "one.ckpt")


def test_a_checkpoint_of_other_models_is_refused(warm_model, tmp_path):
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(tiny.module(warm_model, prm=None), tiny.data(warm_model))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"differs in \d+ weights \(prm\."):
        tiny.trainer(tmp_path, 2).fit(*pieces(warm_model), ckpt_path=tmp_path / "one.ckpt")


# ---- killed from outside, through the command


OVERLAY = """
trainer:
  max_steps: 12
  callbacks:
    - class_path: prime_lightning.training.callbacks.RolloutLog
      init_args: {folder: "${trainer.default_root_dir}"}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        dirpath: ${trainer.default_root_dir}/checkpoints
        every_n_train_steps: 1
        save_last: true
        save_top_k: 0
    - class_path: test_resume.Breath
model: {policy_update: {minibatches: 2}, process_reward: {replay: {iterations: 1}}}
data:
  train: {class_path: prime_lightning.prompts.ArithmeticPrompts, init_args: {seed: 1, operations: 2}}
  sampling: {samples: 4, max_tokens: 8}
  prompts_per_batch: 4
  accuracy_filter: {low: 0.0, high: 1.0}
"""


class Breath(pl.Callback):
    """Takes a moment inside an iteration, so that a kill can fall there, and says where the run is."""

    def on_train_batch_start(self, trainer, *_):
        print(f"inside {trainer.global_step}", flush=True)
        time.sleep(0.02)

    def on_train_batch_end(self, trainer, *_):
        print(f"after {trainer.global_step}", flush=True)


def command(folder, model, *more):
    repository = os.path.dirname(os.path.dirname(__file__))
    (folder / "overlay.yaml").write_text(OVERLAY)
    configs = ["--config", f"{repository}/conf/quickstart.yaml", "--config", str(folder / "overlay.yaml")]
    where = ["--trainer.default_root_dir", str(folder), "--model.policy", str(model)]
    return subprocess.Popen(
        [sys.executable, "-m", "prime_lightning", "fit", *configs, *where, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"},
    )


def weights(folder):
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    del saved["prime"]["metadata"]  # names its own folder, and how long things took
    return {key: saved[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "prime")}


@pytest.mark.slow
def test_kill_9_between_and_inside_of_iterations(warm_model, tmp_path):
    """Killed twice, resumed twice from `last.ckpt`: checkpoints and rollout logs equal those of an undisturbed run."""
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in (undisturbed, disturbed):
        folder.mkdir()
    assert command(undisturbed, warm_model).wait() == 0
    for moment in ("after 4", "inside 8"):
        last = disturbed / "checkpoints" / "last.ckpt"
        run = command(disturbed, warm_model, *(["--ckpt_path", str(last)] if last.is_file() else []))
        for line in run.stdout:
            if line.strip() == moment:
                break
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        assert last.is_file(), moment
    assert command(disturbed, warm_model, "--ckpt_path", str(last)).wait() == 0
    assert_equal(weights(disturbed), weights(undisturbed))
    logs = [[json.loads(line) for line in (f / "rollouts.jsonl").open()] for f in (undisturbed, disturbed)]
    assert logs[0] == logs[1]
    assert [row["iteration"] for row in logs[0]] == sorted(row["iteration"] for row in logs[0])
