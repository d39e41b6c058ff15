"""What runs inside every vLLM worker: our weight-transfer backend, and reading weights back.

vLLM imports this file by `worker_extension_cls` before it loads the model; importing it registers the backend
`prime_host`, which loads weights from memory or a file that the trainer has filled (`weight_transfer.py`). It works on
CPU, where vLLM's own backends (NCCL, CUDA IPC) cannot, and on GPUs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from prime_lightning.engines.weight_transfer import column_of


@dataclass
class HostInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the weights lie."""

    path: str
    nbytes: int
    names: list[str]
    dtype_name: str
    shapes: list[list[int]]
    offsets: list[int]


@dataclass
class HostUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Load all of them."""

    names: list[str] = field(default_factory=list)
    """Unused; vLLM's HTTP route wants a body."""


class HostWeightTransferEngine(WeightTransferEngine[HostInit, HostUpdate]):  # type: ignore[misc]
    """Loads weights from a mapped file, layer by layer as vLLM's own backends do."""

    init_info_cls = HostInit
    update_info_cls = HostUpdate

    def init_transfer_engine(self, init_info: HostInit) -> None:
        """Map the file; a later call replaces the mapping."""
        dtype = getattr(torch, init_info.dtype_name)
        buffer = torch.from_file(init_info.path, shared=True, size=init_info.nbytes, dtype=torch.uint8)
        self.views: list[tuple[str, Tensor]] = []
        for name, shape, start in zip(init_info.names, init_info.shapes, init_info.offsets, strict=True):
            length = torch.Size(shape).numel() * dtype.itemsize
            self.views.append((name, buffer[start : start + length].view(dtype).view(shape)))

    def start_weight_update(self) -> None:
        """Put the layers into loading state."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load; unlike the base class, wait for a device only where there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HostUpdate) -> None:
        """Hand the mapped tensors to the model's loader."""
        self.model.load_weights((name, view.to(self.device)) for name, view in self.views)

    def finish_weight_update(self) -> None:
        """Take the loaded layers into use."""
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied(self.model)

    def shutdown(self) -> None:
        """Forget the mapping."""
        self.views = []


def refresh_tied(model: nn.Module) -> None:
    """On CPU a tied output layer has a packed copy of the embedding, left stale by a reload: pack it again."""
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear") and module.weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class VLLMWorker:
    """Methods added to vLLM's worker; called by `collective_rpc`."""

    model_runner: Any

    @torch.inference_mode()
    def prime_read_back(self, columns: dict[str, int]) -> dict[str, list[float]]:
        """Values of the weights that the model computes with, by their Hugging Face names.

        Packed linear layers have no weights to look at, so they are asked for a unit vector, which gives a column of
        the matrix exactly. Weights that this worker has only a part of (tensor parallel), and those whose name or form
        differs from Hugging Face's, are left out.

        Args:
            columns: The column to read of each.
        """
        model = self.model_runner.get_model()
        read = {name: read_weight(model, name, column) for name, column in columns.items()}
        return {name: column_of(values, 0).float().tolist() for name, values in read.items() if values is not None}


def read_weight(model: nn.Module, name: str, column: int) -> Tensor | None:
    """One column of a weight matrix, or a whole vector; None if it cannot be read here."""
    path, kind = name.rsplit(".", 1)
    found = _module_of(model, path)
    if found is None or getattr(found[0], "tp_size", 1) > 1:
        return None
    module, rows = found
    if kind == "weight" and isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
        return module.weight[: module.org_vocab_size, column]
    if kind == "weight" and (isinstance(module, ParallelLMHead) or hasattr(module, "output_size")):
        return _matrix_column(module, rows, column)
    values = getattr(module, kind, None)
    return values[rows] if values is not None and values.ndim == 1 and values.numel() else None


def _matrix_column(module: Any, rows: slice, column: int) -> Tensor:
    """What the layer makes of a unit vector."""
    head = isinstance(module, ParallelLMHead)
    width = module.embedding_dim if head else module.input_size
    weight = module.weight
    unit = torch.zeros(1, width, dtype=weight.dtype, device=weight.device)
    unit[0, column] = 1
    out: Tensor = module.quant_method.apply(module, unit)[0]
    return out[: module.org_vocab_size] if head else out[rows]


def _module_of(model: Any, path: str) -> tuple[Any, slice] | None:
    """The module with a Hugging Face path, or the fused one that contains it, and its rows there."""
    with contextlib.suppress(AttributeError):
        return model.get_submodule(path), slice(None)
    parent, _, last = path.rpartition(".")
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        if last not in parts or len(parts) < 2:
            continue
        with contextlib.suppress(AttributeError):
            module = model.get_submodule(f"{parent}.{fused}")
            sizes = list(module.output_sizes)
            start = sum(sizes[: parts.index(last)])
            return module, slice(start, start + sizes[parts.index(last)])
    return None


with contextlib.suppress(ValueError):  # registered already, by an import under another name
    WeightTransferEngineFactory.register_engine("prime_host", HostWeightTransferEngine)
