"""What runs inside every vLLM worker: our weight-transfer backend, and reading weights back.

vLLM imports this file by `worker_extension_cls` before it loads the model; importing it registers the backend
`prime_host`, which loads weights from memory or a file that the trainer has filled (`weights/transfer.py`). It works on
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
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from prime_lightning.engines.weights.transfer import column_of, thinning

ADAPTER = 1  # vLLM's number of the policy's adapters


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
    def prime_read_back(self, columns: dict[str, int]) -> dict[str, tuple[int, list[float]]]:
        """Values of the weights that the model computes with, by their Hugging Face names; `joined` takes them.

        Packed linear layers have no weights to look at, so they are asked for a unit vector, which gives a column of
        the matrix exactly. Weights whose name or form differs from Hugging Face's are left out.

        Args:
            columns: The column to read of each.

        Returns:
            Of each weight the thinned-out values that this worker has, and how many of them others have before these.
        """
        model = self.model_runner.get_model()
        parts = {}
        for name, column in columns.items():
            read = read_weight(model, name, column)
            if read is not None:
                values, first, whole = read
                step = thinning(whole)
                start = -first % step
                parts[name] = (first + start) // step, values[start::step].float().tolist()
        return parts

    @torch.inference_mode()
    def prime_read_adapters(self, columns: dict[str, int]) -> dict[str, list[float]]:
        """Values of the adapter matrices that the model computes with, by peft's names, where they are whole here.

        Args:
            columns: The column to read of each.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        slot, read = manager.lora_index_to_id.index(ADAPTER), {}
        for name, column in columns.items():
            path, kind, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            found = _module_of(self.model_runner.get_model(), path)
            if found is not None and found[0].tp_size == 1:
                module, part = found
                stacked = module.lora_a_stacked if kind == "lora_A" else module.lora_b_stacked
                read[name] = column_of(stacked[part][slot, 0], column).float().tolist()
        return read


def read_weight(model: nn.Module, name: str, column: int) -> tuple[Tensor, int, int] | None:
    """One column of a weight matrix, or a whole vector, as far as this worker has it.

    Returns:
        The values, the row of the first one in the whole weight, and the rows of that; None if there is nothing here.
    """
    path, kind = name.rsplit(".", 1)
    found = _module_of(model, path)
    if found is None:
        return None
    module, part = found
    if kind == "weight" and (isinstance(module, VocabParallelEmbedding) or hasattr(module, "output_size")):
        rows, first, whole = _rows_here(module, part)
        values = _matrix_column(module, column)
        return None if values is None else (values[rows], first, whole)
    vector = getattr(module, kind, None)
    if vector is None or vector.ndim != 1 or not vector.numel():
        return None
    rows, first, whole = _rows_here(module, part) if hasattr(module, "output_size") else (slice(None), 0, len(vector))
    return vector[rows], first, whole


def _rows_here(module: Any, part: int) -> tuple[slice, int, int]:
    """Rows of a weight in this worker's layer, the row of the first in the whole weight, and the rows of that."""
    if isinstance(module, VocabParallelEmbedding):
        shard = module.shard_indices
        return slice(shard.num_org_elements), shard.org_vocab_start_index, module.org_vocab_size
    if not isinstance(module, ColumnParallelLinear):  # other layers are split by columns, or not at all
        return slice(None), 0, module.output_size
    sizes = module.output_partition_sizes
    copies = module.num_kv_head_replicas if part and isinstance(module, QKVParallelLinear) else 1
    start, size = sum(sizes[:part]), sizes[part]
    return slice(start, start + size), module.tp_rank // copies * size, module.tp_size // copies * size


def _matrix_column(module: Any, column: int) -> Tensor | None:
    """A column of all rows of a layer; None if another worker has it."""
    weight = module.weight
    if isinstance(module, VocabParallelEmbedding):
        if not isinstance(module, ParallelLMHead):
            return weight[:, column]  # type: ignore[no-any-return]
        width = module.embedding_dim
    else:
        width = getattr(module, "input_size_per_partition", module.input_size)
        if width < module.input_size:
            column -= module.tp_rank * width
    if not 0 <= column < width:
        return None
    unit = torch.zeros(1, width, dtype=weight.dtype, device=weight.device)
    unit[0, column] = 1
    return module.quant_method.apply(module, unit)[0]  # type: ignore[no-any-return]


def _module_of(model: Any, path: str) -> tuple[Any, int] | None:
    """The module with a Hugging Face path, or the fused one that contains it, and which part of that it is."""
    with contextlib.suppress(AttributeError):
        return model.get_submodule(path), 0
    parent, _, last = path.rpartition(".")
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        if last in parts and len(parts) > 1:
            with contextlib.suppress(AttributeError):
                return model.get_submodule(f"{parent}.{fused}"), parts.index(last)
    return None


with contextlib.suppress(ValueError):  # registered already, by an import under another name
    WeightTransferEngineFactory.register_engine("prime_host", HostWeightTransferEngine)
