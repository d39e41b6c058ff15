"""Sums and counts that travel through micro-batches and ranks and become means once, at the logging edge.

They stay on the device where they were computed until then: to read a number, the host waits for all work before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prime_lightning.algorithms.masked import AllReduce

NOTHING = torch.zeros((), dtype=torch.double)


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
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add a sum over `count` things; with a count of 0 throughout, the sum itself is reported."""
        self._sums[name] = self._sums.get(name, NOTHING) + _number(total)
        self._counts[name] = self._counts.get(name, NOTHING) + _number(count)

    def add_all(self, totals: dict[str, Tensor], count: Tensor) -> None:
        """Add sums over the same things; a name that ends in `_max` is a maximum instead."""
        for name, total in totals.items():
            if name.endswith("_max"):
                value = _number(total)
                self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)
            else:
                self.add(name, total, count)

    def total(self, name: str, value: Tensor | float) -> None:
        """Add to what happens on all ranks at once, such as seconds; that of the rank with the most is reported."""
        self._totals[name] = self._totals.get(name, NOTHING) + _number(value)

    def update(self, other: Measures) -> None:
        """Take over what another one measured, under names of its own."""
        for name in ("_sums", "_counts", "_totals", "_maxima"):
            getattr(self, name).update(getattr(other, name))

    def means(
        self, all_reduce: AllReduce | None = None, gather: Callable[[Any], list[Any]] | None = None
    ) -> dict[str, float]:
        """All means, sums, totals and maxima, over all ranks.

        Args:
            all_reduce: Reduces over ranks.
            gather: Gives what each rank has: their names, as one rank may have had nothing to measure.
        """
        sums, counts, highest = _read(self._sums, self._counts, self._totals | self._maxima)
        added, tops = sorted(sums), sorted(highest)
        if gather is not None:
            named = set().union(*gather({f"+{name}" for name in added} | {f"<{name}" for name in tops}))
            added, tops = ([name[1:] for name in sorted(named) if name[0] == kind] for kind in "+<")
        table = torch.stack([NOTHING, *(d.get(n, NOTHING) for n in added for d in (sums, counts))])
        maxima = torch.stack([NOTHING, *(highest.get(n, -torch.inf * (NOTHING + 1)) for n in tops)])
        if all_reduce is not None:
            table, maxima = all_reduce(table, "sum"), all_reduce(maxima, "max")
        pairs = zip(added, table[1:].view(-1, 2).tolist(), strict=True)
        return {n: s / c if c else s for n, (s, c) in pairs} | dict(zip(tops, maxima[1:].tolist(), strict=True))


def _number(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).detach().double()


def _read(*tables: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same numbers on the host, by one transfer from each device that has some."""
    numbers = [number for table in tables for number in table.values()]
    read = {
        device: iter(torch.stack([number for number in numbers if number.device == device]).cpu())
        for device in {number.device for number in numbers}
    }
    return [{name: next(read[number.device]) for name, number in table.items()} for table in tables]
