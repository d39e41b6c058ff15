"""Objects and counts between ranks, over the hosts' network and not by GPUs; and what engines ask of all ranks.

A collective of NCCL is a kernel. A rank that waits in one, for a rank that still samples, say, keeps its GPU and a core
busy, and a tensor-parallel engine on that GPU slow. So what is on the host goes over a gloo group of all ranks. Where
there is one rank, it asks itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, distributed

_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def host_group() -> dist.ProcessGroup:
    """All ranks over gloo: the default group where that is gloo, else one that is made at the first call.

    The first call is a collective: all ranks make it. The group has the default one's timeout and ends with it.
    """
    world = dist.group.WORLD
    assert world is not None
    if dist.get_backend() == "gloo":
        return world
    if world not in _GROUPS:
        timeout = world._get_backend(world._device_types[0]).options._timeout
        _GROUPS[world] = dist.new_group(backend="gloo", timeout=timeout)
    return _GROUPS[world]


def of_all_ranks(thing: Any = None) -> list[Any]:
    """What each rank gives, in their order, once all are here; where there is one rank, its own.

    Example:
        >>> of_all_ranks("a")
        ['a']
    """
    things = [thing]
    if dist.is_initialized():
        things *= dist.get_world_size()
        dist.all_gather_object(things, thing, group=host_group())
    return things


def reduced(tensor: Tensor, how: str) -> Tensor:
    """Sum or maximum of a tensor on the host over all ranks.

    Args:
        tensor: The same shape on all ranks; it is left as it is.
        how: `sum` or `max`.
    """
    total = tensor.clone()
    dist.all_reduce(total, getattr(dist.ReduceOp, how.upper()), group=host_group())
    return total


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
