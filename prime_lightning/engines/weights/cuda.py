"""Weights from GPU to GPU, by the trainer's side of vLLM's own backends; imports vLLM into the trainer.

Written from vLLM 0.32's interfaces, and tested with vLLM's own classes on both sides, on a CPU; only the memory of two
processes and the broadcast are stood in for. CUDA IPC and NCCL themselves have been run by no machine of ours.
`transfer: host` does without this file.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

from prime_lightning.engines.weights.transfer import TransferClient, WeightCopy, verify

PIECE = 256 * 2**20  # bytes of device memory through which weights go at a time


def sender_of(
    transfer: str,
    client: TransferClient,
    copy: WeightCopy,
    world_size: int,
    address: str = "127.0.0.1",
    devices: Sequence[int] = (),
) -> IPCSender | NCCLSender:
    """The sender for `ipc` or `nccl`, which has shaken hands.

    Args:
        transfer: Which.
        client: Control calls of the engine, or of all engines at once.
        copy: Keeps what is sent.
        world_size: Workers that receive.
        address: Of this machine, as the workers reach it, for `nccl`.
        devices: GPUs of the workers, as this process numbers them, for `ipc`.
    """
    if transfer == "ipc":
        return IPCSender(client, copy, devices)
    return NCCLSender(client, copy, world_size, address)


class IPCSender:
    """To an engine on GPUs of this process: the tensors go through a buffer on each, which its worker maps.

    It does without vLLM's `IPCTrainerWeightTransferEngine`, which joins all ranks of the trainer in each transfer: here
    one rank owns an engine, and one that was restarted gets its weights while other ranks compute.
    """

    def __init__(self, client: TransferClient, copy: WeightCopy, devices: Sequence[int]) -> None:
        self.client, self.copy, self.devices = client, copy, devices
        client.init_weight_transfer_engine({"packed": True})

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send what passes into the copy, piece by piece.

        Raises:
            RuntimeError: if the engine's weights are then not those that were sent.
        """
        self.client.start_weight_update()
        every = itertools.tee(weights, len(self.devices))  # which keeps as many as fit into a buffer
        for pieces in zip(*map(self._pieces, self.devices, every), strict=True):
            self.client.update_weights(
                {
                    "names": pieces[0].names,
                    "dtype_names": pieces[0].dtype_names,
                    "shapes": pieces[0].shapes,
                    "ipc_handles": {uuid: handle for piece in pieces for uuid, handle in piece.ipc_handle.items()},
                    "tensor_sizes": pieces[0].tensor_sizes,
                }
            )
        self.client.finish_weight_update(str(self.copy.version))
        torch.cuda.ipc_collect()
        verify(self.client, self.copy)

    def resend(self) -> None:
        """Send the copy as it is."""
        self.send(self.copy.tensors.items())

    def _pieces(self, device: int, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Any]:
        """The weights in a buffer on a GPU, as many as fit at a time."""
        with torch.cuda.device(device):
            pieces = packed_ipc_producer(
                on_device(weights, self.copy.dtype),
                gpu_uuid=str(torch.cuda.get_device_properties(device).uuid),
                post_iter_func=lambda item: item[1],
                buffer_size_bytes=bytes_at_a_time(self.copy),
            )
        while True:
            with torch.cuda.device(device):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece


class NCCLSender:
    """To engines on other GPUs, by broadcast."""

    def __init__(self, client: TransferClient, copy: WeightCopy, world_size: int, address: str) -> None:
        self.client, self.copy = client, copy
        self.source = _Source(copy)
        init = NCCLTrainerInitInfo(
            rank=0,
            master_address=address,
            master_port=free_port(),
            world_size=1 + world_size,
            packed_buffer_size_bytes=bytes_at_a_time(copy),
        )
        self.engine = NCCLTrainerWeightTransferEngine.trainer_init(
            init, client=_Versioned(client, copy), source=self.source
        )

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send what passes into the copy, tensor by tensor.

        Raises:
            RuntimeError: if the engine's weights are then not those that were sent.
        """
        self.source.weights = iter(weights)
        torch.cuda.synchronize()  # vLLM packs on streams of its own, which do not wait for the optimizer's
        self.engine.send_weights()
        verify(self.client, self.copy)

    def resend(self) -> None:
        """Send the copy as it is."""
        self.send(self.copy.tensors.items())


class _Source(WeightSource):  # type: ignore[misc]
    """One pass over the weights at hand, in the order of the model."""

    def __init__(self, copy: WeightCopy) -> None:
        self.copy = copy
        self.weights: Iterator[tuple[str, Tensor]] = iter(())

    def metadata(self) -> list[ParamMeta]:
        """Names, formats and shapes."""
        return [ParamMeta(name, self.copy.dtype, shape) for name, shape in self.copy.shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return on_device(self.weights, self.copy.dtype)


class _Versioned:
    """The same control calls; the end of an update says its version, which vLLM's trainer side does not know."""

    def __init__(self, client: TransferClient, copy: WeightCopy) -> None:
        self.client, self.copy = client, copy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Take the weights into use."""
        self.client.finish_weight_update(str(self.copy.version))


def bytes_at_a_time(copy: WeightCopy) -> int:
    """Bytes that go at a time, no fewer than the largest weight has."""
    return max(PIECE, *(tensor.nbytes for tensor in copy.tensors.values()))


def on_device(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights one by one on the current GPU, in the engine's format."""
    for name, tensor in weights:
        yield name, tensor.detach().to(device="cuda", dtype=dtype, non_blocking=False)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
