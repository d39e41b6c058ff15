"""Which GPUs the engines of all ranks use: no two of them the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import distributed


def shared_devices(devices_of_rank: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Devices that more than one rank uses, with those ranks.

    Example:
        >>> shared_devices([["GPU-a"], ["GPU-b"], ["GPU-a"]])
        {'GPU-a': [0, 2]}
    """
    ranks = defaultdict(list)
    for rank, devices in enumerate(devices_of_rank):
        for device in devices:
            ranks[device].append(rank)
    return {device: users for device, users in ranks.items() if len(users) > 1}


def check_devices(devices: Sequence[int]) -> None:
    """Refuse engines of two ranks on one GPU; all ranks call it.

    Args:
        devices: Those of this rank's engine, as torch numbers them.

    Raises:
        ValueError: on all ranks, if two of them name the same GPU.
    """
    if not distributed.is_initialized():
        return
    everyone: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, [str(torch.cuda.get_device_properties(i).uuid) for i in devices])
    for device, ranks in shared_devices(everyone).items():
        raise ValueError(
            f"Expected each rank's engine on GPUs of its own, got the engines of ranks {ranks} on GPU {device}.\n"
            "Leave the engine's `devices` out, so that each takes its rank's GPU, or train with one rank."
        )
