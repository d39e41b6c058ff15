"""The numbers of a benchmark: values of one problem, and the table of all problems over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from prime_lightning.evaluation.statistics import mean_and_error, wilson

if TYPE_CHECKING:
    from prime_lightning.evaluation.metrics import ProblemMetric

UNBOUNDED = ("length",)
"""Values that are no share, and so have a standard error and no interval."""


def problem_values(metrics: Sequence[ProblemMetric], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """All values of one problem: those of the metrics, and truncation, length and unknown verdicts of its samples."""
    texts, scores = [r["completion"] for r in rows], [r["score"] for r in rows]
    values: dict[str, float] = {}
    for metric in metrics:
        values |= metric.problem(texts, scores)
    if "accuracy" in values:  # of one sample, which it is
        values = {name: value for name, value in values.items() if name not in ("pass1", "maj1")}
    lengths = [r["length"] for r in rows if r["length"] is not None]
    cut = [r["finish"] == "length" for r in rows if r["finish"] is not None]
    return values | {
        "truncated": sum(cut) / len(cut) if cut else math.nan,
        "length": sum(lengths) / len(lengths) if lengths else math.nan,
        "unknown": float(sum(score is None for score in scores)),
    }


class ProblemTable(Metric):
    """Rows of values, one a problem, over all ranks.

    Args:
        names: Of the columns.
        samples: K of each problem.

    Example:
        >>> table = ProblemTable(["accuracy", "unknown"], samples=1)
        >>> table.update({"accuracy": 1.0, "unknown": 0.0})
        >>> table.update({"accuracy": 0.0, "unknown": 1.0})
        >>> table.compute()["metrics"]
        {'accuracy': 0.5, 'unknown': 1.0}
    """

    rows: list[Tensor]
    full_state_update = False

    def __init__(self, names: Sequence[str], samples: int) -> None:
        super().__init__()
        self.names, self.samples = list(names), samples
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.rows.append(torch.empty(0, len(self.names), dtype=torch.double))  # a rank may have no problem

    def update(self, values: Mapping[str, float]) -> None:
        """Add a problem."""
        self.rows.append(torch.tensor([[values[name] for name in self.names]], dtype=torch.double, device=self.device))

    def compute(self) -> dict[str, Any]:
        """`problems`, and by name `metrics`, `stderr` and `interval` (95 %); `unknown` is a count of samples."""
        state = cast("list[Tensor] | Tensor", self.rows)
        rows = torch.cat(list(state)) if isinstance(state, list) else state
        columns = dict(zip(self.names, rows.T.tolist(), strict=True)) if len(rows) else {n: [] for n in self.names}
        result: dict[str, Any] = {"problems": len(rows), "metrics": {}, "stderr": {}, "interval": {}}
        for name, values in columns.items():
            if name == "unknown":
                result["metrics"][name] = math.fsum(values)
                continue
            mean, error = mean_and_error(values)
            known = sum(not math.isnan(value) for value in values)
            result["metrics"][name], result["stderr"][name] = mean, error
            if name not in UNBOUNDED:
                result["interval"][name] = list(wilson(mean, error, known, self.samples))
        return result
