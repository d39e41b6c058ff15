"""Which metric is drawn where: sections by prefix, so that a new metric finds its place by its name alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Section:
    """A part of the page; a metric goes to the first one that has a prefix of its name."""

    id: str
    title: str
    help: str
    prefixes: tuple[str, ...]


SECTIONS = (
    Section(
        "learning",
        "Learning",
        "Is it getting better? Training rollouts, before the accuracy filter, and problems that are never trained on.",
        ("val/", "test/", "rollout/accuracy", "train/outcome"),
    ),
    Section("alarms", "Alarms", "1 where an alarm rang; docs/health.md says what to try.", ("alarm/",)),
    Section(
        "prm",
        "Process reward model",
        "Does the PRM know right from wrong? Cross entropy above ln 2 is worse than knowing nothing.",
        ("prm/", "process/", "gate/"),
    ),
    Section(
        "policy",
        "Policy",
        "Is it stable? Ratios near 1, few clipped tokens, entropy that does not fall to 0.",
        ("policy/", "importance/", "critic/", "value/"),
    ),
    Section(
        "rollouts",
        "Rollouts",
        "What is sampled: lengths, truncation, verdicts, what the filter keeps, how old the weights are.",
        ("rollout/", "train/", "filter/", "verdict/", "verifier/"),
    ),
    Section("other", "Everything else", "Metrics of your own.", ("",)),
)
FIRST = (
    *("val/pass1", "rollout/accuracy", "train/outcome", "prm/ce", "prm/accuracy", "prm/auc", "prm/calibration_error"),
    *(
        "prm/outcome_correlation",
        "prm/length_correlation",
        "prm/last_token_share",
        "process/accuracy",
        "process/advantage_share",
        "process/weight",
    ),
    *("policy/reference_kl", "policy/approx_kl", "policy/entropy", "policy/clip_fraction"),
    *("importance/ratio", "policy/grad_norm", "rollout/length", "rollout/truncated", "rollout/acceptance"),
)
"""These come first in their section; the others follow by name."""
TITLES = {
    "val/pass1": "Right answers, problems never trained on (pass@1)",
    "rollout/accuracy": "Right answers, training rollouts",
    "train/outcome": "Right answers among those trained on",
    "prm/ce": "PRM cross entropy (nats)",
    "prm/accuracy": "PRM ranks a right answer above a wrong one",
    "prm/auc": "PRM area under the ROC curve",
    "prm/calibration_error": "PRM calibration error (ECE)",
    "prm/outcome_correlation": "Correlation of process return and outcome",
    "prm/length_correlation": "Correlation of process return and length",
    "prm/last_token_share": "Share of the process reward in the last token",
    "prm/reward": "Process return of a response, mean",
    "prm/replay_age": "Age of replayed rollouts (iterations)",
    "gate/weight": "Gate: 0 holds the process reward back",
    "gate/ce": "Gate: cross entropy, running mean (nats)",
    "gate/accuracy": "Gate: pairs ranked rightly, running mean",
    "process/accuracy": "What is paid ranks a right answer above a wrong one",
    "process/advantage_share": "Share of the advantage from process reward",
    "process/weight": "Weight of the process reward",
    "process/scale": "Scale the process reward is divided by",
    "policy/reference_kl": "KL to the reference (nats per token)",
    "policy/approx_kl": "KL of this iteration's update (nats per token)",
    "policy/entropy": "Entropy (nats per token)",
    "policy/clip_fraction": "Share of clipped tokens",
    "policy/grad_norm": "Gradient norm of the policy",
    "prm/grad_norm": "Gradient norm of the PRM",
    "importance/ratio": "Trainer's over engine's probability, mean",
    "rollout/length": "Tokens of a response, mean",
    "rollout/truncated": "Share of truncated responses",
    "rollout/acceptance": "Share of prompts that pass the filter",
    "train/repetition": "Repetition in responses",
    "importance/ratio_above_two": "Share of tokens with a ratio above 2",
    "importance/ratio_below_half": "Share of tokens with a ratio below 1/2",
    "importance/capped": "Share of tokens with a capped ratio",
    "rollout/unknown": "Share of responses without a verdict",
    "rollout/policy_lag": "Age of the sampling weights (iterations)",
    "rollout/tokens_per_second": "Sampled tokens per second",
}
MINOR = (
    *("*/lr", "*/loss", "*/skipped_steps", "*_max", "*_tokens", "*_groups", "filter/*", "verdict/*", "verifier/*"),
    *("importance/abs_diff", "importance/weight", "importance/kl", "policy/ratio", "policy/clip_fraction_*"),
    *("rollout/groups", "rollout/responses", "rollout/tokens"),
)
"""Patterns of names that are folded away at first; a new metric is in plain sight."""
GUIDES: dict[str, tuple[float, str]] = {
    "prm/ce": (math.log(2), "ln 2: knows nothing"),
    "prm/accuracy": (0.5, "chance"),
    "prm/auc": (0.5, "chance"),
    "process/accuracy": (0.5, "chance"),
    "prm/outcome_correlation": (0.0, "none"),
    "prm/length_correlation": (0.0, "none"),
    "importance/ratio": (1.0, "the same weights"),
}
"""A line to compare with."""
SIDES = ("_before", "_after")
"""A metric on the other side of an update is drawn over the metric itself."""
PHASES = {
    "sample": "sampling",
    "verify": "verifying",
    "score": "scoring",
    "prm": "PRM",
    "policy": "policy",
    "critic": "critic",
    "sync": "weight sync",
    "evaluation": "evaluation",
}
"""Seconds of `time/<phase>`, in the order of an iteration; others follow by name."""


def sections(names: Iterable[str]) -> list[dict[str, Any]]:
    """The sections with their panels; each panel has a title, metric names, and maybe a guide.

    Example:
        >>> [section] = sections(["prm/ce_after", "prm/ce", "time/prm"])
        >>> section["title"], section["panels"][0]["names"]
        ('Process reward model', ['prm/ce', 'prm/ce_after'])
    """
    drawn = sorted((name for name in set(names) if not name.startswith("time/")), key=_place)
    panels: dict[str, dict[str, list[str]]] = {section.id: {} for section in SECTIONS}
    for name in drawn:
        section = next(s for s in SECTIONS if name.startswith(s.prefixes))
        home = _home(name, drawn)
        panels[section.id].setdefault(home, []).append(name)
    return [
        asdict(section) | {"panels": [_panel(home, found) for home, found in panels[section.id].items()]}
        for section in SECTIONS
        if panels[section.id]
    ]


def phases(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names of the metrics of phases and what they are called, in the order of an iteration.

    Example:
        >>> phases(["time/verify", "time/sample", "loss"])
        [('time/sample', 'sampling'), ('time/verify', 'verifying')]
    """
    found = {name.removeprefix("time/") for name in names if name.startswith("time/")}
    ordered = [phase for phase in PHASES if phase in found] + sorted(found - set(PHASES))
    return [(f"time/{phase}", PHASES.get(phase, phase)) for phase in ordered]


def _home(name: str, drawn: list[str]) -> str:
    for side in SIDES:
        if name.endswith(side) and name.removesuffix(side) in drawn:
            return name.removesuffix(side)
    return name


def _panel(home: str, names: list[str]) -> dict[str, Any]:
    minor = any(fnmatchcase(home, pattern) for pattern in MINOR)
    return {"title": TITLES.get(home, home), "names": names, "guide": GUIDES.get(home), "minor": minor}


def _place(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else len(FIRST), name)
