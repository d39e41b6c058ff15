"""Objects and counts between ranks, over the hosts' network and not by GPUs.

A collective of NCCL is a kernel. A rank that waits in one, for a rank that still samples, say, keeps its GPU and a core
busy, and a tensor-parallel engine on that GPU slow. So what is on the host goes over a gloo group of all ranks.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

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
