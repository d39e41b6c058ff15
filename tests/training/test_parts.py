"""`PrimeModule` is one class that has parts, and its callbacks get one typed record of each iteration."""

import copy
from dataclasses import FrozenInstanceError

import pytest
import tiny


def test_the_module_is_one_class_and_its_parts_hold_no_weights(warm_model):
    prime = tiny.module(warm_model)
    prime.configure_model()
    assert [kind for kind in type(prime).__mro__ if kind.__module__.startswith("prime_lightning")] == [tiny.PrimeModule]
    assert {name.split(".")[0] for name in prime.state_dict()} == {"policy", "prm"}
    twin = copy.deepcopy(prime)
    assert twin.stepper.module is twin
    assert twin.panel.measures is twin.prm_learner.measures is twin.stepper.measures is not prime.measures
    assert twin.prm_learner.gate is twin.gate


def test_callbacks_get_a_record_of_what_was_trained_and_logged(warm_model, tmp_path):
    prime = tiny.module(warm_model)
    history = tiny.fit(tmp_path, prime, tiny.data(warm_model), 2)
    assert [out.number for out in history.outputs] == [0, 1]
    for out, row in zip(history.outputs, history.rows, strict=True):
        assert {name: out.metrics[name] for name in row} == row
        assert {"time/sync", "time/score", "time/prm", "time/policy"} <= out.metrics.keys()
        assert out.process_BT.shape == out.advantage_BT.shape == out.batch.mask_BT.shape
        assert out.batch.version_BT[out.batch.mask_BT].eq(out.number).all()
        with pytest.raises(FrozenInstanceError):
            out.number = 5
