"""Reads `rollouts.jsonl`, of any size, for the credit view: whole groups, spread evenly over the iterations.

A first pass over the file keeps only where each group's lines are and how long; a second one reads the groups that fit
on a page. Lines that are no rollouts, such as one that a crash cut off, are counted and left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prime_lightning.rollout.files import parse_row

LONGEST = 4096
"""Tokens of a response that are shown."""
PER_TOKEN = ("process_reward", "advantage")
VERDICTS = ("correct", "wrong", "partial", "unknown")


@dataclass(kw_only=True)
class Sampled:
    """Groups for the page, and what was left out."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    """By iteration: `iteration`, `draw`, `prompt`, `answer`, `source`, `unit` (nats a unit of reward), `responses`."""
    kept: int = 0
    """Responses in them."""
    total: int = 0
    """Responses in the file."""
    broken: int = 0
    """Lines that could not be read."""
    cut: int = 0
    """Responses of which only the first `LONGEST` tokens are shown."""


def sample_rollouts(path: Path, budget: int) -> Sampled:
    """Groups whose lines have at most `budget` bytes together; the first of them always.

    Raises:
        OSError: if the file cannot be read.
    """
    places: dict[tuple[int, Any], list[tuple[int, int]]] = defaultdict(list)
    sampled = Sampled()
    for offset, line in _lines(path):
        row = parse(line)
        if row is None:
            sampled.broken += bool(line.strip())
            continue
        sampled.total += 1
        places[row["iteration"], row["draw"]].append((offset, len(line)))
    chosen = choose({group: sum(size for _, size in lines) for group, lines in places.items()}, budget)
    with path.open("rb") as file:
        for group in sorted(chosen, key=lambda group: (group[0], places[group][0])):
            rows = []
            for offset, size in places[group]:
                file.seek(offset)
                row = parse(file.read(size))
                if row is not None:  # a live run may have begun its log anew
                    rows.append(row)
            if rows:
                sampled.cut += sum(len(row["tokens"]) > LONGEST for row in rows)
                sampled.kept += len(rows)
                sampled.groups.append(_group(rows))
    return sampled


def choose(sizes: dict[tuple[int, Any], int], budget: int) -> list[tuple[int, Any]]:
    """Groups within the budget: the first of each iteration, then the second, ..., iterations in a spread-out order.

    Example:
        >>> choose({(0, 7): 10, (0, 8): 10, (1, 9): 10, (2, 5): 10}, 30)
        [(0, 7), (2, 5), (1, 9)]
    """
    by_iteration: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    for group in sizes:
        by_iteration[group[0]].append(group)
    order = [by_iteration[iteration] for iteration in spread(sorted(by_iteration))]
    queue = [
        groups[level] for level in range(max(map(len, order), default=0)) for groups in order if level < len(groups)
    ]
    chosen: list[tuple[int, Any]] = []
    for group in queue:
        budget -= sizes[group]
        if budget < 0 and chosen:
            break
        chosen.append(group)
    return chosen


def spread(items: list[int]) -> list[int]:
    """First, last, middle, quarters, ...: each beginning of the list covers the whole evenly.

    Example:
        >>> spread([0, 1, 2, 3, 4])
        [0, 4, 2, 1, 3]
    """
    if not items:
        return []
    order = {0: None, len(items) - 1: None}
    parts = 1
    while len(order) < len(items):
        parts *= 2
        order |= {round(i * (len(items) - 1) / parts): None for i in range(1, parts, 2)}
    return [items[i] for i in order]


def parse(line: bytes) -> dict[str, Any] | None:
    """A line of the file as a rollout; None if it is none.

    Example:
        >>> parse(b'{"iteration": 1, "draw": 2, "tok') is None
        True
    """
    row = parse_row(line)
    if row is None or not isinstance(row.get("iteration"), int) or isinstance(row.get("draw"), dict | list):
        return None
    tokens = row.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return None
    return row | {"draw": row.get("draw")}


def short(x: Any) -> float | None:
    """A number with three digits, which a colour and a tooltip need; None for anything else.

    Example:
        >>> short(0.123456), short(float("nan")), short("1")
        (0.123, None, None)
    """
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        return None
    return float(f"{x:.3g}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    texts = {key: str(first.get(key, "")) for key in ("prompt", "answer", "source")}
    beta, scale = short(first.get("beta")), short(first.get("scale"))
    return {
        "iteration": first["iteration"],
        "draw": first["draw"] if isinstance(first["draw"], int) else str(first["draw"]),
        **texts,
        "unit": short(scale / beta) if beta and scale else None,
        "responses": [_response(row) for row in rows],
    }


def _response(row: dict[str, Any]) -> dict[str, Any]:
    count = len(row["tokens"])
    numbers = {
        name: [short(x) for x in row[name][:LONGEST]]
        for name in PER_TOKEN
        if isinstance(row.get(name), list) and len(row[name]) == count
    }
    return {
        "tokens": row["tokens"][:LONGEST],
        "length": count,
        "verdict": row.get("verdict") if row.get("verdict") in VERDICTS else "unknown",
        "score": short(row.get("score")),
        "finish": "length" if row.get("finish") == "length" else "stop",
        "steps": [[int(a), int(b), bool(ok)] for a, b, ok in _triples(row.get("steps"))],
        **numbers,
    }


def _triples(steps: Any) -> Iterator[tuple[int, int, bool]]:
    for step in steps if isinstance(steps, list) else []:
        if isinstance(step, list) and len(step) == 3 and all(isinstance(x, int) for x in step):
            yield step[0], step[1], bool(step[2])
