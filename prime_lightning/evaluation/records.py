"""Records of a benchmark: one JSON line a sample, written problem by problem, read back whole.

A file that a crash cut off loses its last problem and nothing else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prime_lightning.rollout import Group, Prompt, Verdict

NOT_ASKED = "not asked: "
"""How the reason of a sample begins that the engine could not draw."""
Record = dict[str, Any]
"""`problem` (position of the row), `id`, `sample`, `prompt`, `answer`, `completion`, `tokens`, `finish`, `verdict`,
`score` (null where unknown), `reason`."""


def record(
    problem: int,
    sample: int,
    row: Mapping[str, Any],
    *,
    prompt: str,
    answer: str,
    completion: str,
    verdict: Verdict,
    tokens: int | None = None,
    finish: str | None = None,
) -> Record:
    """One sample."""
    return {
        "problem": problem,
        "id": str(row.get("id", problem)),
        "sample": sample,
        "prompt": prompt,
        "answer": answer,
        "completion": completion,
        "tokens": tokens,
        "finish": finish,
        "verdict": str(verdict.label),
        "score": verdict.score if verdict.known else None,
        "reason": verdict.reason,
    }


def of_group(group: Group) -> list[Record]:
    """The samples of one problem."""
    return [
        record(
            rollout.prompt.draw,
            sample,
            rollout.prompt.row,
            prompt=rollout.prompt.text,
            answer=rollout.prompt.answer,
            completion=rollout.completion.text,
            verdict=rollout.verdict,
            tokens=len(rollout.completion.token_ids),
            finish=str(rollout.completion.finish),
        )
        for sample, rollout in enumerate(group)
    ]


def not_asked(prompt: Prompt, samples: int, room: float) -> list[Record]:
    """The samples of a problem whose prompt does not fit the engine's context: none, and each counts as wrong."""
    reason = f"{NOT_ASKED}its prompt has {len(prompt.token_ids)} tokens, and the engine has room for {room}"
    verdict = Verdict.of_score(0.0, reason=reason)
    about: dict[str, Any] = {"prompt": prompt.text, "answer": prompt.answer, "completion": "", "verdict": verdict}
    return [record(prompt.draw, sample, prompt.row, **about) for sample in range(samples)]


def is_asked(row: Mapping[str, Any]) -> bool:
    """Whether the engine was given the problem of a record."""
    return not str(row.get("reason", "")).startswith(NOT_ASKED)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file, without lines that are none (a crash cuts a line off)."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def whole_problems(path: Path, samples: int) -> dict[int, list[Record]]:
    """The problems of a record file that have all of their samples, in the order of the file.

    Those that did not fit an engine's context are asked anew: it may be another one by now.
    """
    groups: dict[int, list[Record]] = {}
    for row in rows_of(path):
        if isinstance(row.get("problem"), int) and "score" in row and is_asked(row):
            groups.setdefault(row["problem"], []).append(row)
    return {problem: rows for problem, rows in groups.items() if len(rows) == samples}


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines, on the disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(dumps(row) + "\n" for row in rows))


def replace(path: Path, text: str) -> None:
    """Write a file beside, then put it into its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def dumps(value: Any, **options: Any) -> str:
    """JSON by the standard: NaN and infinity are null.

    Example:
        >>> dumps({"mean": float("nan"), "of": (1.5, 2)})
        '{"mean": null, "of": [1.5, 2]}'
    """
    return json.dumps(_plain(value), **options)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
