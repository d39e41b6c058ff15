"""What engines ask of the other ranks of the run, all together; where there is one rank, it asks itself."""

from __future__ import annotations

from typing import Any

from torch import distributed


def rank() -> int:
    """This rank's number."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def of_all_ranks(thing: Any = None) -> list[Any]:
    """What each rank gives, in their order, once all are here.

    Example:
        >>> of_all_ranks("a")
        ['a']
    """
    things = [thing]
    if distributed.is_initialized():
        things *= distributed.get_world_size()
        distributed.all_gather_object(things, thing)
    return things
