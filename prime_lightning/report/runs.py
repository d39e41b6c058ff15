"""Reads what a run's folder holds: metrics of all its starts, configuration, benchmarks.

A run that was resumed has a CSV file per start (`version_0`, `version_1`, ...). A later start takes over from the first
iteration that it trained on, since it did all later ones again.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from prime_lightning.rollout.files import parse_row

METRICS = ("metrics.csv", "version_*/metrics.csv", "csv/version_*/metrics.csv", "lightning_logs/version_*/metrics.csv")
OUTSIDE = ("val/", "test/", "time/evaluation")
"""Metrics of evaluations, which no start of the training does again."""
NAMES_OF_SEEDS = {"seed", "seed_everything", "ckpt_path", "max_time"}


WATCHING = ("trainer.callbacks.", "trainer.logger", "trainer.log_every", "trainer.enable_", "trainer.default_root_dir")
"""Settings that say what is written, and where, and not what is learned."""


@dataclass(kw_only=True)
class Run:
    """One run, read."""

    path: Path
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics by iteration; iteration n is sampled from, and evaluated with, the policy after n iterations."""
    config: dict[str, Any] = field(default_factory=dict)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What a reader should know of the data, such as lines that could not be read."""

    @property
    def rollouts(self) -> Path:
        """Where `RolloutLog` writes."""
        return self.path / "rollouts.jsonl"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the learning, flat, without seeds, the run's folder as `RUN`: equal for runs that are seeds."""
        trainer = self.config.get("trainer")
        root = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
        flat = {key: value for key, value in _flat(self.config) if not key.startswith(WATCHING)}
        return {
            key: value.replace(root, "RUN") if root and isinstance(value, str) else value for key, value in flat.items()
        }

    @property
    def seed(self) -> Any:
        """What `seed_everything` was."""
        return self.config.get("seed_everything")


def read_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        OSError: if there is no such folder.
        ValueError: if it holds nothing that a run writes.
    """
    run = Run(path=Path(folder))
    if not run.path.is_dir():
        raise FileNotFoundError(f"Expected the folder of a run, got {str(folder)!r}, which is no folder.")
    files = files_of(run.path)
    if not files:
        raise ValueError(
            f"Expected the folder of a run, with csv/version_*/metrics.csv, rollouts.jsonl or benchmarks.jsonl in it; "
            f"{str(folder)!r} has none of them. A run's folder is its trainer.default_root_dir."
        )
    starts = [path for path in files if path.name == "metrics.csv"]
    run.rows = join([read_metrics(path) for path in starts])
    run.config = _config([*(path.with_name("config.yaml") for path in starts), run.path / "config.yaml"])
    run.benchmarks = list(_benchmarks(run))
    for row in run.benchmarks:
        spent = run.rows.get(row["iteration"], {})
        spent["time/evaluation"] = spent.get("time/evaluation", 0.0) + (row["seconds"] or 0.0)
    run.summary = _json(run.path / "summary.json")
    if not run.rows:
        run.notes.append("no metrics.csv, so no curves: add lightning.pytorch.loggers.CSVLogger to trainer.logger.")
    return run


def files_of(folder: Path) -> list[Path]:
    """The files that a report is made of, starts of the run in their order."""
    starts = sorted({path for pattern in METRICS for path in folder.glob(pattern)}, key=_start)
    return [*starts, *(p for p in (folder / "rollouts.jsonl", folder / "benchmarks.jsonl") if p.is_file())]


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """A `metrics.csv` by its step; a last line that was cut off is left out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    rows: dict[int, dict[str, float]] = {}
    for line in csv.DictReader(whole.replace("\0", "").splitlines()):
        numbers = {name: number for name, value in line.items() if name and (number := _number(value)) is not None}
        step = numbers.pop("step", None)
        numbers.pop("epoch", None)
        if step is not None:
            rows.setdefault(int(step), {}).update(numbers)
    return rows


def join(starts: list[dict[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    """The metrics of several starts of one run: a later one replaces what an earlier one trained from its start on.

    Example:
        >>> first = {0: {"loss": 3.0}, 1: {"loss": 2.0}, 2: {"loss": 9.0}}
        >>> join([first, {2: {"loss": 1.0}}, {2: {"val/pass1": 0.5}}])
        {0: {'loss': 3.0}, 1: {'loss': 2.0}, 2: {'loss': 1.0, 'val/pass1': 0.5}}
    """
    joined: dict[int, dict[str, float]] = {}
    for rows in starts:
        begin = min((step for step, row in rows.items() if _trained(row)), default=math.inf)
        joined = {
            step: row if step < begin else {name: x for name, x in row.items() if name.startswith(OUTSIDE)}
            for step, row in joined.items()
        }
        for step, row in rows.items():
            joined[step] = joined.get(step, {}) | row
    return {step: joined[step] for step in sorted(joined) if joined[step]}


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """For each run, the settings in which not all runs agree."""
    names = sorted(set().union(*(run.settings for run in runs)))
    differing = [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]
    return [{name: run.settings.get(name) for name in differing} for run in runs]


def _trained(row: dict[str, float]) -> bool:
    return any(not name.startswith(OUTSIDE) for name in row)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _start(path: Path) -> tuple[str, int]:
    version = re.fullmatch(r"version_(\d+)", path.parent.name)
    return str(path.parent.parent), int(version[1]) if version else -1


def _config(paths: list[Path]) -> dict[str, Any]:
    """The first configuration that can be read."""
    for path in paths:
        if path.is_file():
            try:
                config = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
            except yaml.YAMLError:
                continue
            if isinstance(config, dict):
                return config
    return {}


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key not in NAMES_OF_SEEDS:
                yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from _flat(value, f"{prefix}.{i}")
    else:
        yield prefix, config


def _benchmarks(run: Run) -> Iterator[dict[str, Any]]:
    path = run.path / "benchmarks.jsonl"
    broken = 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = parse_row(line) or {}
            intervals = row.get("interval") or {}
            yield {
                "iteration": int(row["iteration"]),
                "benchmark": str(row["benchmark"]),
                "problems": row.get("problems"),
                "samples": row.get("samples"),
                "seconds": _number(row.get("seconds")),
                "metrics": {str(k): _number(v) for k, v in row["metrics"].items()},
                "interval": {str(k): [_number(low), _number(high)] for k, (low, high) in intervals.items()},
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            broken += 1
    if broken:
        run.notes.append(f"{broken} lines of benchmarks.jsonl could not be read and are left out.")


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
