"""The policy's weights reach the engine, whatever callbacks there are."""

import pytest
import tiny
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def engine_gap(prime, engine):
    own = dict(engine.model.named_parameters())
    return max(float((own[name] - p.detach()).abs().max()) for name, p in prime.policy.model.named_parameters())


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_without_callbacks_samples_from_its_policy(warm_model, tmp_path, staleness):
    prime, data = tiny.module(warm_model), tiny.data(warm_model, max_staleness=staleness)
    history = tiny.fit(tmp_path, prime, data, 4, callbacks=[])
    assert [row["rollout/policy_lag_max"] for row in history.rows] == [min(i, staleness) for i in range(4)]
    assert prime.passes.engine_checked
    assert data.engine.version == 4
    assert engine_gap(prime, data.engine) == 0


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_evaluation_alone_samples_from_the_policy(warm_model, tmp_path, what):
    prompts, sampling = tiny.ArithmeticPrompts(seed=2, operations=2), tiny.Sampling(samples=1, max_tokens=8)
    data = tiny.data(warm_model, validation=prompts, validation_prompts=4, validation_sampling=sampling)
    prime = tiny.module(warm_model)
    prime.configure_model()
    with torch.no_grad():
        next(prime.policy.parameters()).add_(0.1)  # no longer what the engine starts with
    getattr(tiny.trainer(tmp_path, 1), what)(prime, data)
    assert data.engine.version == 0
    assert engine_gap(prime, data.engine) == 0


class Closed(tiny.RolloutDataModule):
    """A data module that takes no weights."""

    sync = None


@pytest.mark.parametrize("what", ["fit", "validate"])
def test_a_data_module_that_takes_no_weights_is_refused(warm_model, tmp_path, what):
    data = Closed(str(warm_model), train=tiny.ArithmeticPrompts(seed=1), engine=tiny.HFEngine())
    with pytest.raises(ValueError, match=r"by `sync\(weights, version\)` and `rest\(\)`.*got Closed"):
        getattr(tiny.trainer(tmp_path, 1), what)(tiny.module(warm_model), data)


def test_no_data_module_at_all_is_refused(warm_model, tmp_path):
    with pytest.raises((ValueError, MisconfigurationException), match="got none"):
        tiny.trainer(tmp_path, 1).fit(tiny.module(warm_model), train_dataloaders=[1])
