"""Samples of a benchmark: rows of rollouts, each with its number `sample`, written problem by problem.

A file that a crash cut off loses its last problem and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prime_lightning.rollout import Completion, Group, Prompt, Rollout, Verdict
from prime_lightning.rollout.files import Row, whole_rows

NOT_ASKED = "not asked: "
"""How the reason of a sample begins that the engine could not draw."""


def sample_rows(group: Group) -> list[Row]:
    """The samples of one problem."""
    return [{**rollout.to_row(), "sample": sample} for sample, rollout in enumerate(group)]


def too_long(prompt: Prompt, samples: int, room: float) -> list[Row]:
    """The samples of a problem whose prompt does not fit the engine's context: none, and each counts as wrong."""
    reason = f"{NOT_ASKED}its prompt has {len(prompt.token_ids)} tokens, and the engine has room for {room}"
    nothing = Completion(text="", token_ids=[], logprobs=[], finish=None, versions=[])
    rollout = Rollout(prompt=prompt, completion=nothing, verdict=Verdict.of_score(0.0, reason=reason))
    return sample_rows([rollout] * samples)


def is_asked(row: Mapping[str, Any]) -> bool:
    """Whether the engine was given the problem of a sample."""
    return not str(row.get("reason", "")).startswith(NOT_ASKED)


def whole_problems(path: Path, samples: int) -> dict[int, list[Row]]:
    """The problems of a file that have all of their samples, in the order of the file.

    Those that did not fit an engine's context are asked anew: it may be another one by now.

    Raises:
        ValueError: if a row is no sample.
    """
    groups: dict[int, list[Row]] = {}
    for number, row in enumerate(whole_rows(path), 1):
        rollout = Rollout.from_row(row, f"row {number} of {str(path)!r}")
        if is_asked(row):
            groups.setdefault(rollout.prompt.draw, []).append({**rollout.to_row(), "sample": row.get("sample")})
    return {draw: rows for draw, rows in groups.items() if len(rows) == samples}
