"""Each alarm on a series that must ring it and on one that must not; what they do; and that they outlive a resume."""

import json
import math
import random
import warnings
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from prime_lightning import algorithms as alg
from prime_lightning.training.callbacks.alarms import MEANINGS, Alarm, Alarms
from prime_lightning.training.options import ProcessReward

QUICKSTART = json.loads((Path(__file__).parents[1] / "golden" / "quickstart.json").read_text())


def noisy(values, seed=0, size=0.02):
    draws = random.Random(seed)
    return [value * (1 + size * draws.uniform(-1, 1)) for value in values]


def line(start, end, n=40):
    return [start + (end - start) * i / (n - 1) for i in range(n)]


def late(calm, wild, n=40, at=25):
    return [calm] * at + [wild] * (n - at)


SERIES = {
    "reward_hacking": (
        {"prm/reward": line(0.1, 3.0), "rollout/accuracy": [*line(0.3, 0.6, 20), *line(0.6, 0.2, 20)]},
        {"prm/reward": line(0.1, 3.0), "rollout/accuracy": line(0.3, 0.6)},  # both rise: learning
    ),
    "broken_prm": ({"prm/nonfinite_tokens": late(0.0, 7.0)}, {"prm/nonfinite_tokens": [0.0] * 40}),
    "prm_collapse": ({"prm/ce": late(0.65, 0.9)}, {"prm/ce": [math.log(2)] * 20 + line(0.69, 0.6, 20)}),
    "length_drift": ({"rollout/length": line(900, 2500)}, {"rollout/length": line(900, 1400)}),
    "stale_weights": ({"importance/abs_diff": late(0.01, 0.3)}, {"importance/abs_diff": [0.02] * 40}),
    "entropy_collapse": ({"policy/entropy": late(0.5, 0.01)}, {"policy/entropy": line(0.5, 0.15)}),
    "clip_fraction": (
        {"policy/clip_fraction": late(0.01, 0.4)},
        {"policy/clip_fraction": [0.05, 0.3, 0.05, 0.02] * 10},
    ),
    "gradient_norm": (
        {"policy/grad_norm": [0.2] * 40, "prm/grad_norm": late(5.0, 400.0)},
        {"policy/grad_norm": [0.2, 0.2, 9.0, 0.2] * 10, "prm/grad_norm": line(5.0, 30.0)},  # spikes are clipped
    ),
    "truncation": ({"rollout/truncated": line(0.05, 0.9)}, {"rollout/truncated": [0.05, 0.25] * 20}),
    "repetition": ({"train/repetition": late(0.1, 0.8)}, {"train/repetition": line(0.1, 0.3)}),
    "unknown_verdicts": ({"rollout/unknown": late(0.0, 0.2)}, {"rollout/unknown": late(0.0, 0.2, at=38)}),
    "acceptance": ({"rollout/acceptance": line(0.6, 0.01)}, {"rollout/acceptance": line(0.6, 0.2)}),
}


def feed(alarms, series):
    """What rings, and at which iteration."""
    names = series.keys()
    rows = (dict(zip(names, values, strict=True)) for values in zip(*series.values(), strict=True))
    return {name: i for i, row in enumerate(rows) for name in alarms.look(row)}


@pytest.mark.parametrize("name", MEANINGS)
@pytest.mark.parametrize("seed", range(3))
def test_an_alarm_rings_when_it_must_and_only_then(name, seed):
    sick, well = ({m: noisy(v, seed) for m, v in series.items()} for series in SERIES[name])
    assert feed(Alarms(), well) == {}
    assert set(feed(Alarms(), sick)) == {name}
    assert feed(Alarms(**{name: Alarm(threshold=Alarms().alarms[name].threshold, iterations=99)}), sick) == {}
    off = Alarm(threshold=Alarms().alarms[name].threshold, iterations=3, action="off")
    assert feed(Alarms(**{name: off}), sick) == {}


def test_a_healthy_quickstart_rings_none():
    """The numbers of `prime-lightning quickstart`, seed 0; see golden/quickstart.json."""
    assert len(QUICKSTART["prm/ce"]) == 40
    assert {m for meaning in MEANINGS.values() for m in meaning.metrics} == QUICKSTART.keys()
    assert feed(Alarms(), QUICKSTART) == {}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.sampled_from(sorted(MEANINGS)))
def test_a_resumed_run_rings_at_the_same_iteration(cut, name):
    whole = feed(Alarms(), SERIES[name][0])
    before = Alarms()
    rang = feed(before, {m: v[:cut] for m, v in SERIES[name][0].items()})
    after = Alarms()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    rest = feed(after, {m: v[cut:] for m, v in SERIES[name][0].items()})
    assert {**rang, **{n: i + cut for n, i in rest.items()}} == whole
    assert len(whole) == 1


def test_gaps_and_nan_are_passed_over():
    alarms = Alarms(prm_collapse=Alarm(threshold=0.7, iterations=3))
    rows = [{"prm/ce": 0.9}, {}, {"prm/ce": math.nan}, {"prm/ce": 0.9}, {"other": 1.0}, {"prm/ce": 0.9}]
    assert [alarms.look(row) for row in rows] == [[], [], [], [], [], ["prm_collapse"]]


@pytest.mark.parametrize("wrong", [{"iterations": 0, "threshold": 1.0}, {"iterations": 3, "threshold": math.nan}])
def test_an_alarm_that_can_never_ring_is_refused(wrong):
    with pytest.raises(ValueError, match="action: off"):
        Alarm(**wrong)


def test_stop_and_cut_in_a_run(warm_model, tmp_path):
    """A cut keeps the process reward out from the next iteration on; a stop ends the run; each warns once."""
    alarms = Alarms(
        prm_collapse=Alarm(threshold=0.0, iterations=2, action="cut"),
        truncation=Alarm(threshold=-1.0, iterations=4, action="stop"),
    )
    prime = tiny.module(
        warm_model,
        gate=alg.ProcessGate(max_ce=None, min_accuracy=0.0),
        process_reward=ProcessReward(beta=0.5),
    )
    history = tiny.History()
    trainer = tiny.trainer(tmp_path, 9, alarms, history=history)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(prime, tiny.data(warm_model))
    rows = [row for row in history.rows if "prm/ce" in row]
    assert [row["process/weight"] for row in rows] == [1, 1, 0, 0]
    assert [row["process/advantage_share"] > 0 for row in rows[1:]] == [True, False, False]
    assert [name for row in history.rows for name in row if name.startswith("alarm/")] == [
        "alarm/prm_collapse",
        "alarm/truncation",
    ]
    words = [str(w.message) for w in said if "Alarm " in str(w.message)]
    assert len(words) == 2
    assert "at iteration 2 (prm/ce " in words[0]
    assert "The process reward is off from now on." in words[0]
    assert "The run stops here." in words[1]
    closed = alg.ProcessGate(max_ce=None, min_accuracy=0.0)
    closed.load_state_dict(prime.gate.state_dict())
    assert (closed.weight, closed.update(0.1, 1.0)) == (0.0, 0.0)


def test_an_alarm_that_rang_stays_quiet_after_a_resume(model_folder, tmp_path):
    def run(steps, **options):
        alarms = Alarms(truncation=Alarm(threshold=-1.0, iterations=2))
        saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last=True, save_top_k=0)
        trainer = tiny.trainer(tmp_path, steps, alarms, saving)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(tiny.module(model_folder), tiny.data(model_folder), **options)
        return alarms, sum("Alarm truncation" in str(w.message) for w in said)

    first, rang = run(2)
    assert (first.rung, rang) == (["truncation"], 1)
    second, rang = run(3, ckpt_path=str(tmp_path / "last.ckpt"))
    assert (second.rung, rang) == (["truncation"], 0)
    assert len(second.state_dict()["last"]["rollout/truncated"]) == 3
