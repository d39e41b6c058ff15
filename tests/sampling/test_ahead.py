"""Asynchronous mode: batches are sampled while the trainer works, and every token says how old its weights were."""

import itertools
import threading

import lightning.pytorch as pl
import pytest
import tiny

from prime_lightning.rollout import Sampling
from prime_lightning.sampling.ahead import AheadLoader


def fit(model, folder, steps, *callbacks, ckpt_path=None, **options):
    history = tiny.History()
    trainer = tiny.trainer(folder, steps, *callbacks, history=history)
    trainer.fit(tiny.module(model), tiny.data(model, **options), ckpt_path=ckpt_path)
    return trainer, history


@pytest.mark.parametrize(("staleness", "oversample"), [(1, 1.0), (2, 1.0), (1, 4.0), (2, 4.0)])
def test_no_token_is_older_than_allowed(warm_model, tmp_path, staleness, oversample):
    """Also where groups are left over, which wait for their batch to be filled and then for it to be trained on."""
    engine = tiny.Backwards(batch_size=32)
    _, history = fit(warm_model, tmp_path, 8, max_staleness=staleness, oversample=oversample, engine=engine)
    lags = []
    for iteration, out in enumerate(history.outputs):
        batch = out.batch
        versions = batch.version_BT[batch.mask_BT]
        assert int(versions.min()) >= 0
        assert int(versions.max()) <= iteration
        lags.append(iteration - int(versions.min()))
        for rollout in batch.rollouts:  # weights only ever become newer inside a completion
            assert rollout.completion.versions == sorted(rollout.completion.versions)
    assert max(lags) <= staleness
    assert max(lags) > 0  # it did run ahead
    draws = [r.prompt.draw for out in history.outputs for r in out.batch.rollouts[::4]]
    assert draws == sorted(set(draws))


def test_the_correction_sees_the_older_weights(warm_model, tmp_path):
    _, history = fit(warm_model, tmp_path, 6, max_staleness=1)
    late = [row for row in history.rows if row["rollout/policy_lag"] > 0]
    assert late
    assert max(row["importance/abs_diff_max"] for row in late) > 1e-3


def test_resume_samples_again_what_was_not_trained_on(warm_model, tmp_path):
    save = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3)
    _, history = fit(warm_model, tmp_path, 3, save, max_staleness=2)
    _, more = fit(warm_model, tmp_path, 5, max_staleness=2, ckpt_path=tmp_path / "step=3.ckpt")
    draws = [r.prompt.draw for out in history.outputs + more.outputs for r in out.batch.rollouts[::4]]
    assert draws == list(range(5 * 4))  # the filter is off: each prompt once, none left out


def test_a_failure_of_the_thread_reaches_the_trainer(warm_model, tmp_path):
    class Broken(tiny.HFEngine):
        def stream(self, prompts, sampling, finished=None):
            if self.version >= 1:
                raise ValueError("the engine broke")
            yield from super().stream(prompts, sampling, finished)

    with pytest.raises(ValueError, match="the engine broke"):
        fit(warm_model, tmp_path, 6, max_staleness=1, engine=Broken())
    assert not [t for t in threading.enumerate() if t.name == "sampling ahead"]


def test_the_thread_ends_with_the_iterator(warm_model):
    data = tiny.data(warm_model)
    data.setup("fit")
    batches = iter(AheadLoader(data.training_loader(0, 1), 1))
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "sampling ahead"]
    data.close()


def test_without_staleness_the_loader_is_the_synchronous_one(warm_model, tmp_path):
    data = tiny.data(warm_model, max_staleness=0)
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(tiny.module(warm_model), data)
    assert not isinstance(trainer.train_dataloader, AheadLoader)


def test_negative_staleness_is_refused(warm_model):
    with pytest.raises(
        ValueError, match=r"Expected `data.max_staleness` of 0 \(synchronous\) or more iterations, got -1"
    ):
        tiny.data(warm_model, max_staleness=-1)


class Sleeper(tiny.HFEngine):
    """An engine whose weights are gone once it has slept, and which tells what was asked of it."""

    def __init__(self):
        super().__init__(batch_size=32)
        self.asleep, self.calls = False, []

    def stream(self, prompts, sampling, finished=None):
        assert not self.asleep
        assert self.version >= 0
        self.calls.append("sample")
        yield from super().stream(prompts, sampling, finished)

    def load_weights(self, weights, version):
        assert not self.asleep
        self.calls.append("sync")
        super().load_weights(weights, version)

    def sleep(self):
        self.calls.append("sleep")
        self.asleep, self.version = True, -1

    def wake(self):
        self.asleep = False


def test_the_engine_sleeps_while_the_trainer_works_and_only_then(warm_model, tmp_path):
    class Training(pl.Callback):
        def on_before_optimizer_step(self, *_):
            engine.calls.append("train" if engine.asleep else "train beside the engine")

    engine = Sleeper()
    validation = {
        "validation": tiny.ArithmeticPrompts(seed=2, operations=2),
        "validation_prompts": 4,
        "validation_sampling": Sampling(samples=1, max_tokens=8),
    }
    data = tiny.data(warm_model, engine=engine, **validation)
    trainer = tiny.trainer(tmp_path, 2, Training(), val_check_interval=1, limit_val_batches=1)
    trainer.fit(tiny.module(warm_model), data)
    trained = [call for call, _ in itertools.groupby(engine.calls)]
    assert trained == ["sync", "sample", "sleep", "train", "sync", "sample", "sleep", "train", "sync", "sample"]


def test_an_engine_that_samples_ahead_does_not_sleep(warm_model, tmp_path):
    engine = Sleeper()
    fit(warm_model, tmp_path, 3, max_staleness=1, engine=engine)
    assert "sleep" not in engine.calls
