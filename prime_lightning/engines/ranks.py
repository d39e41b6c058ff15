"""What engines ask of the other ranks of the run, all together; where there is one rank, it asks itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import distributed

from prime_lightning.engines.host_group import of_all_ranks


def rank() -> int:
    """This rank's number."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def together(act: Callable[[], Any]) -> list[Any]:
    """Do it on all ranks, wait for all, and give what each returned; a rank that failed stops all of them.

    Raises:
        ValueError: where a rank's `act` raised one; on other ranks the message begins with its number.
        RuntimeError: likewise, for all other exceptions.

    Example:
        >>> together(lambda: "done")
        ['done']
    """
    mine: Exception | None = None
    result = None
    try:
        result = act()
    except Exception as error:
        mine = error
    kind = ValueError if isinstance(mine, ValueError) else RuntimeError
    outcomes = of_all_ranks((result, mine and (kind, str(mine))))
    for number, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise mine or failure[0](f"Rank {number}: {failure[1]}")
    return [result for result, _ in outcomes]
