"""Which GPUs the engines of all ranks use, no two of them the same, and how weights get there."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence

import torch

from prime_lightning.engines.host_group import of_all_ranks


def transfer_of(transfer: str, cuda: bool, devices: Sequence[int] | None) -> str:
    """The way of the weights to an engine: `host`, `ipc` or `nccl`.

    Args:
        transfer: What the user wants; `auto` leaves it to us.
        cuda: Whether the engine is on GPUs.
        devices: GPUs of its own, or None.

    Example:
        >>> transfer_of("auto", cuda=True, devices=None), transfer_of("auto", cuda=True, devices=[2])
        ('ipc', 'nccl')
    """
    if transfer in ("ipc", "nccl") and not cuda:
        raise ValueError(f"Expected transfer `host` or `auto` on CPU, got {transfer!r}, which is for GPUs.")
    if transfer == "ipc" and devices is not None:
        raise ValueError(f"Expected transfer `nccl` or `host` for GPUs of the engine's own, got {transfer!r}.")
    if transfer == "auto":
        transfer = "host" if not cuda else "ipc" if devices is None else "nccl"
    if transfer == "ipc" and expandable_segments():
        warnings.warn(
            "PYTORCH_ALLOC_CONF has expandable_segments:True, and such memory cannot be opened by the engine's "
            "process: weights go by `transfer: host`. Leave it out of the environment for `ipc`, which is faster.",
            stacklevel=3,
        )
        return "host"
    return transfer


def expandable_segments() -> bool:
    """Whether torch's allocator on GPUs was told to take segments that grow."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the first that is set, as torch has it
    conf = next((os.environ[name] for name in names if os.environ.get(name)), "")
    fields = dict(field.split(":", 1) for field in conf.replace(" ", "").split(",") if ":" in field)
    return fields.get("expandable_segments", "").lower() in ("true", "1")


def own_gpu() -> int:
    """The GPU of this rank, as torch numbers it.

    Raises:
        ValueError: if there is none.
    """
    try:
        return torch.cuda.current_device()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"Expected a GPU for an engine with `device: cuda`, got none ({error}). Set it to auto or cpu."
        ) from None


def visible(devices: Sequence[int]) -> str:
    """`CUDA_VISIBLE_DEVICES` of a process that is to see these alone, as this process numbers them."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return ",".join(named[device] if named else str(device) for device in devices)


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
        devices: Those of this rank's engine, as torch numbers them; none if it has no engine of its own.

    Raises:
        ValueError: on all ranks, if two of them name the same GPU.
    """
    everyone = of_all_ranks([str(torch.cuda.get_device_properties(device).uuid) for device in devices])
    for device, ranks in shared_devices(everyone).items():
        raise ValueError(
            f"Expected each rank's engine on GPUs of its own, got the engines of ranks {ranks} on GPU {device}.\n"
            "Leave the engine's `devices` out, so that each takes its rank's GPU, or train with one rank."
        )
