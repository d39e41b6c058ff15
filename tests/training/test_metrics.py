"""docs/metrics.md against what real runs log: each name stands in the table, and each row is logged by some run."""

import math
import re
from pathlib import Path

import pytest
import tiny
from toys import write_jsonl

from prime_lightning import algorithms as alg
from prime_lightning.evaluation.callback import Benchmarks
from prime_lightning.prm.train import LabelledDataModule, PRMModule
from prime_lightning.prompts.arithmetic import ArithmeticPrompts
from prime_lightning.prompts.dataset import MixedPrompts
from prime_lightning.prompts.difficulty import ByDifficulty
from prime_lightning.rollout import Sampling
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.training.callbacks.alarms import MEANINGS, Alarm, Alarms
from prime_lightning.training.options import PolicyLoss, ProcessReward, Replaying
from prime_lightning.training.sft import LessonDataModule, SFTModule

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
ROWS = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", TEXT, re.MULTILINE)
SHORTER = alg.OverlongPenalty(max_tokens=8, cache=2)
OTHERS = {"epoch", "step"}  # Lightning's own


class Names(tiny.History):
    """Keeps all names, times too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)
        self.names |= metrics.keys()
        assert all(math.isfinite(value) for value in metrics.values()), metrics


@pytest.fixture(scope="module")
def logged(tmp_path_factory, warm_model):
    """Names of runs that together use everything: critic, reference, replay, filter, validation, alarms, benchmarks."""
    history = Names()
    folder = tmp_path_factory.mktemp("metrics")
    short, long = (ArithmeticPrompts(seed=1, operations=n) for n in (2, 4))
    rollouts = tiny.data(
        warm_model,
        train=MixedPrompts([short, long]),
        max_prompt_tokens=8,
        accuracy_filter=AccuracyFilter(),
        validation=short,
        validation_prompts=4,
        validation_sampling=Sampling(samples=1, max_tokens=8),
    )
    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    alarms = Alarms(truncation=Alarm(threshold=-1.0, iterations=1))
    first = tiny.module(
        warm_model,
        reference=str(warm_model),
        critic=str(warm_model),
        advantage=alg.gae,
        process_reward=ProcessReward(beta=0.5, replay=Replaying(iterations=1)),
        policy_loss=PolicyLoss(kl="loss"),
        critic_optimizer=tiny.adam(1e-3),
    )
    tiny.trainer(folder, 2, alarms, history=history, **settings).fit(first, rollouts)
    every = ProcessReward(beta=0.5, update="before", learn_from="all", intercept="base_rate", process_only="all")
    gate = alg.ProcessGate(max_ce=None, min_accuracy=0.0)
    second = tiny.module(warm_model, process_reward=every, gate=gate, outcome_shaping=SHORTER)
    tiny.trainer(folder, 2, history=history).fit(second, tiny.data(warm_model, accuracy_filter=AccuracyFilter()))
    known = ByDifficulty(short, keep=1e-9)
    known.learn(0, [1.0])
    third = tiny.data(warm_model, train=known, max_staleness=1)
    benchmarks = Benchmarks(str(folder), ["arithmetic"], limit=2, before=False)
    tiny.trainer(folder, 1, benchmarks, history=history).fit(tiny.module(warm_model), third)
    row = {"prompt": "^1+1+1=", "responses": ["2;3;#3", "2;4;#4"], "labels": [1, 0]}
    rows = write_jsonl(folder / "labelled.jsonl", [row | {"prompt": f"^1+{i}+1="} for i in range(8)])
    for learner, lessons in (
        (SFTModule(str(warm_model)), LessonDataModule(str(warm_model), tiny.ArithmeticLessons(size=8), batch_size=8)),
        (
            PRMModule(str(warm_model)),
            LabelledDataModule(str(warm_model), rows, prompts_per_batch=4, validation_share=0.2),
        ),
    ):
        tiny.trainer(folder, 1, history=history, callbacks=[], val_check_interval=1).fit(learner, lessons)
    return history.names - OTHERS


def pattern(name):
    """Of the benchmarks it takes the one that runs here, as any name with a slash would fit them all."""
    return re.compile(re.sub(r"\b[A-Z]+\b", "[^/]+", name.replace("BENCHMARK", "arithmetic")) + r"\Z")


def test_every_logged_name_stands_in_the_table(logged):
    table = [pattern(name) for name, _ in ROWS]
    assert [name for name in sorted(logged) if sum(bool(p.match(name)) for p in table) != 1] == []


def test_every_name_of_the_table_is_logged(logged):
    assert len(ROWS) > 60
    assert [name for name, _ in ROWS if not any(pattern(name).match(n) for n in logged)] == []
    assert all(unit.strip() for _, unit in ROWS)


def test_alarms_look_at_metrics_of_the_table():
    assert {m for meaning in MEANINGS.values() for m in meaning.metrics} <= {name for name, _ in ROWS}
