"""Weights from GPU to GPU, by the trainer's side of vLLM's own backends; imports vLLM into the trainer.

Written from vLLM 0.32's interfaces, and tested with vLLM's own classes on both sides, on a CPU; only the memory of two
processes and the broadcast are stood in for. CUDA IPC and NCCL themselves have been run by no machine of ours.
`transfer: host` does without this file.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

from prime_lightning.engines.weight_transfer import TransferClient, WeightCopy, verify

PIECE = 256 * 2**20  # bytes of device memory through which weights go at a time


def sender_of(
    transfer: str, client: TransferClient, copy: WeightCopy, world_size: int, address: str = "127.0.0.1"
) -> IPCSender | NCCLSender:
    """The sender for `ipc` or `nccl`, which has shaken hands.

    Args:
        transfer: Which.
        client: Control calls of the engine, or of all engines at once.
        copy: Keeps what is sent.
        world_size: Workers that receive.
        address: Of this machine, as the workers reach it.
    """
    return IPCSender(client, copy) if transfer == "ipc" else NCCLSender(client, copy, world_size, address)


class IPCSender:
    """To an engine on the same GPU: the tensors go through one buffer that both processes map.

    It does without vLLM's `IPCTrainerWeightTransferEngine`, which joins all ranks of the trainer in each transfer: here
    each rank has an engine of its own, and one that was restarted gets its weights while other ranks compute.
    """

    def __init__(self, client: TransferClient, copy: WeightCopy) -> None:
        self.client, self.copy = client, copy
        client.init_weight_transfer_engine({"packed": True})

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send what passes into the copy, piece by piece.

        Raises:
            RuntimeError: if the engine's weights are then not those that were sent.
        """
        device = torch.cuda.current_device()
        self.client.start_weight_update()
        for piece in packed_ipc_producer(
            on_device(weights, self.copy.dtype),
            gpu_uuid=str(torch.cuda.get_device_properties(device).uuid),
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=bytes_at_a_time(self.copy),
        ):
            self.client.update_weights(
                {
                    "names": piece.names,
                    "dtype_names": piece.dtype_names,
                    "shapes": piece.shapes,
                    "ipc_handles": piece.ipc_handle,
                    "tensor_sizes": piece.tensor_sizes,
                }
            )
        self.client.finish_weight_update(str(self.copy.version))
        torch.cuda.ipc_collect()
        verify(self.client, self.copy)

    def resend(self) -> None:
        """Send the copy as it is."""
        self.send(self.copy.tensors.items())


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
