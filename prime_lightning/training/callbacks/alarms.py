"""Alarms: what kills a run of this kind, seen in its own numbers, and what to do about it.

`Alarms` is part of every `prime-lightning fit`; its thresholds stand under `alarms:` in the YAML. Each alarm looks at
one or two metrics of the first and the last iterations and warns once. Metric names and units: docs/metrics.md.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median, pstdev
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

Action = Literal["off", "warn", "stop", "cut"]
"""What an alarm does beside warning: nothing, end the run after this iteration, or cut the process reward off."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """When one alarm rings.

    Example:
        >>> Alarm(threshold=0.2, iterations=5).action
        'warn'
    """

    threshold: float
    """In the unit of the metric, or a factor; see the alarm."""
    iterations: int
    """How many of the last iterations must agree, and how many first ones they are compared with."""
    action: Action = "warn"
    """`off`, `warn`, `stop`, or `cut`, which sets the weight of the process reward to 0 for the rest of the run."""

    def __post_init__(self) -> None:
        if self.iterations < 1 or not math.isfinite(self.threshold):
            raise ValueError(
                f"Expected an alarm's `iterations` of at least 1 and a finite `threshold`, got {self.iterations} and "
                f"{self.threshold}. Set `action: off` to silence it."
            )


@dataclass(frozen=True)
class Series:
    """A metric's first and last values, equally many."""

    first: list[float]
    last: list[float]


def above(threshold: float, *series: Series) -> bool:
    """All last values of a metric are above the threshold."""
    return any(min(s.last) > threshold for s in series)


def below(threshold: float, *series: Series) -> bool:
    """All last values of a metric are below the threshold."""
    return any(max(s.last) < threshold for s in series)


def shrunk(threshold: float, *series: Series) -> bool:
    """All last values of a metric are below `threshold` times the mean of the first."""
    return any(max(s.last) < threshold * fmean(s.first) for s in series)


def grown(threshold: float, *series: Series) -> bool:
    """All last values of a metric are above `threshold` times the median of the first."""
    return any(min(s.last) > threshold * median(s.first) for s in series)


def drifted(threshold: float, *series: Series) -> bool:
    """The mean of the last values is `threshold` times that of the first, or its inverse."""
    return any(fmean(s.last) > threshold * fmean(s.first) or threshold * fmean(s.last) < fmean(s.first) for s in series)


def parted(threshold: float, reward: Series, outcome: Series) -> bool:
    """In the last iterations the reward rose by more than its spread, and the outcome fell by more than `threshold`."""
    half = len(reward.last) // 2
    if not half:
        return False
    (early, late), (before, after) = ((s.last[:half], s.last[half:]) for s in (reward, outcome))
    rose = fmean(late) - fmean(early) > max(pstdev(early), pstdev(late))
    return rose and fmean(before) - fmean(after) > threshold


@dataclass(frozen=True)
class Meaning:
    """What an alarm looks at and says."""

    metrics: tuple[str, ...]
    rings: Callable[..., bool]
    means: str
    attempt: str


MEANINGS = {
    "reward_hacking": Meaning(
        ("prm/reward", "rollout/accuracy"),
        parted,
        "the process reward rises while right answers become fewer: the policy may be pleasing the PRM",
        "lower model.credit.process_weight, raise model.process_reward.replay.iterations, read the rollouts of highest "
        "process reward; action: cut goes on with the outcome alone",
    ),
    "broken_prm": Meaning(
        ("prm/nonfinite_tokens",),
        above,
        "the PRM gives numbers that are not finite; such iterations learn from outcomes alone",
        "lower the PRM's learning rate, load models in float32, start again from a checkpoint before it began",
    ),
    "prm_collapse": Meaning(
        ("prm/ce",),
        above,
        "the PRM predicts outcomes worse than a coin (a cross entropy above ln 2 = 0.693): its rewards mislead",
        "lower the learning rate of model.prm_optimizer or model.process_reward.beta",
    ),
    "length_drift": Meaning(
        ("rollout/length",),
        drifted,
        "responses have become much longer or shorter than at the start",
        "look at prm/length_correlation and rollout/truncated; if it is not reasoning that grows, set "
        "data.accuracy_filter.truncated: reject, or model.policy_loss.aggregate: sequence",
    ),
    "stale_weights": Meaning(
        ("importance/abs_diff",),
        above,
        "engine and trainer disagree about the log-probs of the sampled tokens: old weights or another precision",
        "lower data.max_staleness and data.oversample, take the same dtype in engine and trainer, and keep "
        "model.policy_loss.importance_cap on",
    ),
    "entropy_collapse": Meaning(
        ("policy/entropy",),
        shrunk,
        "the policy has almost stopped exploring",
        "raise model.policy_loss.clip_high or entropy_weight, lower the policy's learning rate, or end the run here",
    ),
    "clip_fraction": Meaning(
        ("policy/clip_fraction",),
        above,
        "many tokens are clipped: the policy moves far within one iteration",
        "lower the policy's learning rate, or take fewer model.policy_update.minibatches and epochs",
    ),
    "gradient_norm": Meaning(
        ("policy/grad_norm", "prm/grad_norm"),
        grown,
        "a gradient has become many times as large as at the start",
        "lower the learning rate of that model; look at importance/ratio_above_two and for broken data",
    ),
    "truncation": Meaning(
        ("rollout/truncated",),
        above,
        "many responses hit data.sampling.max_tokens and were graded without their end",
        "raise data.sampling.max_tokens, or set data.accuracy_filter.truncated: mask",
    ),
    "repetition": Meaning(
        ("train/repetition",),
        above,
        "responses say the same again and again",
        "lower the policy's learning rate, set data.accuracy_filter.truncated: reject, start again from a checkpoint "
        "before it began",
    ),
    "unknown_verdicts": Meaning(
        ("rollout/unknown",),
        above,
        "the verifier itself fails for many responses, which are then left out",
        "read the reason in the warnings of the data module; raise the limits of data.verifiers",
    ),
    "acceptance": Meaning(
        ("rollout/acceptance",),
        below,
        "the accuracy filter throws most of the sampling away: prompts are too easy or too hard by now",
        "take prompts of another difficulty, raise data.sampling.samples, or widen data.accuracy_filter",
    ),
}


class Alarms(Callback):
    """Warns once for each thing that goes wrong, and stops the run or cuts the process reward off where asked to.

    The state is part of checkpoints. An alarm is logged as `alarm/NAME` = 1 at the iteration at which it rings.

    Args:
        reward_hacking: Fall of `rollout/accuracy` between the two halves of the last iterations, while `prm/reward`
            rises by more than its spread.
        broken_prm: Tokens that `prm/nonfinite_tokens` is above.
        prm_collapse: Nats that `prm/ce` is above; ln 2 and a margin, as a fresh PRM starts at ln 2.
        length_drift: Factor between `rollout/length` now and at the start, either way.
        stale_weights: Nats a token that `importance/abs_diff` is above.
        entropy_collapse: Share of the starting `policy/entropy` that it is below.
        clip_fraction: Share of tokens that `policy/clip_fraction` is above.
        gradient_norm: Factor between `policy/grad_norm` or `prm/grad_norm` now and its median at the start.
        truncation: Share of responses that `rollout/truncated` is above.
        repetition: Share of 4-grams that `train/repetition` is above.
        unknown_verdicts: Share of responses that `rollout/unknown` is above.
        acceptance: Share of prompts that `rollout/acceptance` is below.
    """

    def __init__(
        self,
        reward_hacking: Alarm = Alarm(threshold=0.05, iterations=20),
        broken_prm: Alarm = Alarm(threshold=0.0, iterations=1),
        prm_collapse: Alarm = Alarm(threshold=0.7, iterations=10),
        length_drift: Alarm = Alarm(threshold=2.0, iterations=10),
        stale_weights: Alarm = Alarm(threshold=0.1, iterations=3),
        entropy_collapse: Alarm = Alarm(threshold=0.1, iterations=10),
        clip_fraction: Alarm = Alarm(threshold=0.2, iterations=5),
        gradient_norm: Alarm = Alarm(threshold=20.0, iterations=3),
        truncation: Alarm = Alarm(threshold=0.2, iterations=5),
        repetition: Alarm = Alarm(threshold=0.5, iterations=5),
        unknown_verdicts: Alarm = Alarm(threshold=0.05, iterations=3),
        acceptance: Alarm = Alarm(threshold=0.1, iterations=5),
    ) -> None:
        settings = locals()
        self.alarms: dict[str, Alarm] = {name: settings[name] for name in MEANINGS}
        self.rung: list[str] = []
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, deque[float]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at this iteration; its numbers are the same on all ranks, and so is what is done."""
        for name in self.look(outputs["iteration"].metrics):
            for logger in trainer.loggers:
                logger.log_metrics({f"alarm/{name}": 1.0}, step=trainer.global_step - 1)
            if trainer.is_global_zero:
                warnings.warn(self.words(name, trainer.global_step), stacklevel=2)
            if self.alarms[name].action == "stop":
                trainer.should_stop = True
            if self.alarms[name].action == "cut":
                pl_module.cut_process_reward()  # type: ignore[operator]

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """Take in one iteration's metrics; the alarms that ring now for the first time."""
        for metric in {m for meaning in MEANINGS.values() for m in meaning.metrics} & metrics.keys():
            if math.isfinite(metrics[metric]):
                self._remember(metric, float(metrics[metric]))
        now = [name for name in MEANINGS if name not in self.rung and self.rings(name)]
        self.rung += now
        return now

    def rings(self, name: str) -> bool:
        """Whether the last iterations are such that this alarm rings."""
        alarm, meaning = self.alarms[name], MEANINGS[name]
        n = alarm.iterations
        known = [metric for metric in meaning.metrics if len(self._last.get(metric, ())) >= n]
        if alarm.action == "off" or not known or (meaning.rings is parted and len(known) < len(meaning.metrics)):
            return False
        return meaning.rings(alarm.threshold, *(Series(self._first[m][:n], list(self._last[m])[-n:]) for m in known))

    def words(self, name: str, iteration: int) -> str:
        """What happened, what it means, and what to try."""
        alarm, meaning = self.alarms[name], MEANINGS[name]
        numbers = ", ".join(f"{m} {self._last[m][-1]:.4g}" for m in meaning.metrics if m in self._last)
        did = {"stop": " The run stops here.", "cut": " The process reward is off from now on."}.get(alarm.action, "")
        return (
            f"Alarm {name} at iteration {iteration} ({numbers}; threshold {alarm.threshold:g} over {alarm.iterations} "
            f"iterations): {meaning.means}. Try: {meaning.attempt}.{did} (alarms.{name} sets it; it rings once.)"
        )

    def _remember(self, metric: str, value: float) -> None:
        longest = max(alarm.iterations for alarm in self.alarms.values())
        first = self._first.setdefault(metric, [])
        if len(first) < longest:
            first.append(value)
        self._last.setdefault(metric, deque(maxlen=longest)).append(value)

    def state_dict(self) -> dict[str, Any]:
        """What has rung, and the values that alarms compare."""
        return {"rung": self.rung, "first": self._first, "last": {m: list(v) for m, v in self._last.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        longest = max(alarm.iterations for alarm in self.alarms.values())
        self.rung, self._first = list(state_dict["rung"]), dict(state_dict["first"])
        self._last = {m: deque(v, maxlen=longest) for m, v in state_dict["last"].items()}
