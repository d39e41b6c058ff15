"""Sums and counts that travel through micro-batches and ranks and become means once, at the logging edge.

Also what a run says of itself in its checkpoints and in the cards of its models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prime_lightning.algorithms import AllReduce


class Measures:
    """What one iteration measures.

    Example:
        >>> measures = Measures()
        >>> measures.add("prm/ce", torch.tensor(3.0), torch.tensor(4))
        >>> measures.add("prm/ce", torch.tensor(1.0), torch.tensor(4))
        >>> measures.means()
        {'prm/ce': 0.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: Tensor | float = 1.0) -> None:
        """Add a sum over `count` things; with a count of 0 throughout, the sum itself is reported."""
        total, count = torch.as_tensor(total).detach().double().cpu(), torch.as_tensor(count).double().cpu()
        self._sums[name] = self._sums.get(name, torch.zeros((), dtype=torch.double)) + total
        self._counts[name] = self._counts.get(name, torch.zeros((), dtype=torch.double)) + count

    def add_all(self, totals: dict[str, Tensor], count: Tensor) -> None:
        """Add sums over the same things; a name that ends in `_max` is a maximum instead."""
        for name, total in totals.items():
            if name.endswith("_max"):
                value = total.detach().double().cpu()
                self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)
            else:
                self.add(name, total, count)

    def means(self, all_reduce: AllReduce | None = None) -> dict[str, float]:
        """All means and maxima, over all ranks; every rank must have measured the same names."""
        names, tops = sorted(self._sums), sorted(self._maxima)
        rows = [torch.stack([self._sums[n], self._counts[n]]) for n in names]
        table = torch.stack(rows) if rows else torch.empty(0, 2)
        maxima = torch.stack([self._maxima[n] for n in tops]) if tops else torch.empty(0)
        if all_reduce is not None:
            table, maxima = all_reduce(table, "sum"), all_reduce(maxima, "max")
        means = {n: float(s / c) if c else float(s) for n, (s, c) in zip(names, table, strict=True)}
        return means | {n: float(m) for n, m in zip(tops, maxima, strict=True)}


def run_facts(module: Any) -> dict[str, Any]:
    """What a run knows of itself: the module's own facts, the command, iterations, and the last numbers; plain values.

    Args:
        module: A Lightning module inside its trainer, with `facts()` and `command`.
    """
    metrics = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    return {
        **module.facts(),
        "command": module.command,
        "iterations": module.trainer.global_step,
        "numbers": {name: value for name, value in metrics.items() if math.isfinite(value)},
    }


def import_path(function: Callable[..., Any]) -> str:
    """Where a function is imported from, for readers.

    Example:
        >>> import_path(run_facts)
        'prime_lightning.measures.run_facts'
    """
    function = getattr(function, "func", function)  # of a partial
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
