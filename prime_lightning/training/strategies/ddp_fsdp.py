"""Strategies for several devices: replicas of the models, or FSDP2 shards of them. DeepSpeed is in `deepspeed.py`.

A module with a `Stepper` runs forward passes of several models in one training step and accumulates over micro-batches.
DistributedDataParallel around the whole module would take each of its models for unused in each backward pass of
another one, and send all gradients with every micro-batch. So models are treated one by one here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from prime_lightning.engines.host_group import of_all_ranks
from prime_lightning.models.logprobs import causal_lm
from prime_lightning.training.stepping import RoleStrategy, parameters
from prime_lightning.training.strategies.checkpoint import Folder, not_written, read, remove, stored
from prime_lightning.training.strategies.placement import copies_of


class PrimeDDPStrategy(RoleStrategy, DDPStrategy):
    """A whole copy of each model on each device, gradients averaged once per optimizer step.

    A module that Lightning optimizes itself, such as `SFTModule`, is wrapped in DistributedDataParallel as ever.
    Arguments are those of Lightning's `DDPStrategy`.
    """

    def configure_ddp(self) -> None:
        """Start from the weights of rank 0."""
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:
            super().configure_ddp()
        else:
            _sync_module_states(self.lightning_module)

    def clipped_step(self, optimizer: LightningOptimizer, limit: float) -> Tensor:
        """Average the gradient over ranks first."""
        average_gradients(parameters(optimizer.optimizer))
        return super().clipped_step(optimizer, limit)


def average_gradients(updated: list[nn.Parameter]) -> None:
    """Make the gradients of all ranks their mean."""
    for parameter in updated:
        if parameter.grad is None:  # such as an expert that no token of this rank came to
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in updated if parameter.grad is not None]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    torch._foreach_div_(gradients, dist.get_world_size())


class Sharded(RoleStrategy, ParallelStrategy):
    """Checkpoints of models that no rank has as a whole: folders of whole tensors, see `checkpoint.py`."""

    shares_weights = False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_optimizer_state_dict` is to be called."""
        return True

    def master(self, parameter: Tensor) -> Tensor:
        """The whole weight as the optimizer has it, which may be in a higher precision."""
        return self.whole(parameter)

    @abstractmethod
    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Set a weight."""

    @abstractmethod
    def put_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Set the state of an optimizer."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder, each tensor by one rank.

        Raises:
            OSError: on all ranks if one of them cannot write.
        """
        target, version = Path(self.broadcast(str(filepath))), self.broadcast(uuid4().hex)
        folder = Folder(target, version, self.global_rank, self.world_size)
        if self.is_global_zero:
            folder.begin()
        self.barrier()
        weights = {name: folder.add(id(p), partial(self.master, p)) for name, p in checkpoint["state_dict"].items()}
        states = [_keys(state, folder) for state in checkpoint.get("optimizer_states", [])]
        folder.flush()
        if self.is_global_zero and not self._errors(folder):
            folder.commit(checkpoint | {"state_dict": weights, "optimizer_states": states})
        elif not self.is_global_zero:
            self._errors(folder)
        errors = self._errors(folder)
        if errors:
            if self.is_global_zero:
                folder.abandon()
            raise OSError(not_written(target, errors[0]))

    def _errors(self, folder: Folder) -> list[str]:
        """What went wrong on any rank."""
        errors = of_all_ranks(str(folder.error) if folder.error else None)
        return [error for error in errors if error is not None]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint of either kind; its tensors stay on disk until each is put in its place."""
        return read(self.broadcast(str(checkpoint_path)))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put each weight in its place."""
        done: set[int] = set()
        for name, parameter in self.lightning_module_state_dict().items():
            if name in checkpoint["state_dict"] and id(parameter) not in done:
                done.add(id(parameter))
                self.put(parameter, stored(checkpoint["state_dict"][name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the state of each optimizer in its place."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self.put_state(optimizer, state)
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({name: value for name, value in saved.items() if name != "params"})

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint."""
        if self.is_global_zero:
            remove(filepath)


def _keys(state: dict[str, Any], folder: Folder) -> dict[str, Any]:
    """The state of an optimizer with keys in the place of its tensors, which are gathered and written."""
    return state | {
        "state": {
            i: {k: folder.add(id(v), v) if callable(v) else v for k, v in one.items()}
            for i, one in state["state"].items()
        }
    }


def optimizer_state(state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state in torch's format: parameters by their number."""
    count = iter(range(10**9))
    numbered = [{**group, "params": [next(count) for _ in group["params"]]} for group in groups]
    return {"state": state, "param_groups": numbered}


def own(value: Any, device: torch.device | None = None) -> Any:
    """A copy, on a device if one is given; parameters must not share a count of steps that each of them raises."""
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def counts_on(group: dict[str, Any], parameter: Tensor) -> torch.device | None:
    """Where an optimizer counts a parameter's steps: fused kernels read them beside it, others on the host (None)."""
    return parameter.device if group.get("fused") or group.get("capturable") else None


class PrimeFSDPStrategy(Sharded, ModelParallelStrategy):
    """FSDP2: each decoder layer's parameters, gradients and optimizer state are spread over devices.

    Args:
        replicas: Whole copies of each model, each spread over `ranks / replicas` ranks in a row (HSDP). 1 spreads over
            all devices, which takes the least memory; `nodes` keeps a copy on each node, so that weights are gathered
            inside nodes and only gradients travel between them.
        timeout: Of collectives.
    """

    def __init__(self, replicas: int | Literal["nodes"] = 1, timeout: timedelta | None = default_pg_timeout) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, timeout=timeout)
        self.replicas = replicas

    def setup(self, trainer: Any) -> None:
        """Refuse a module whose models were not placed: each rank would train its own, and nothing would say so.

        Raises:
            ValueError: with what is not spread.
        """
        super().setup(trainer)
        assert self.lightning_module is not None
        loose = [name for name, p in self.lightning_module.named_parameters() if not isinstance(p, DTensor)]
        if loose:
            raise ValueError(
                f"Expected models that `configure_model` spreads over the devices, by the strategy's `place`, got "
                f"{len(loose)} weights that are not ({', '.join(loose[:3])} ...). `scoring.load_scoring` does it."
            )

    def setup_environment(self) -> None:
        """Lightning's mesh over all devices, and our own, which may have a dimension of copies."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        copies = copies_of(self.replicas, self.num_nodes, self.world_size)
        sizes, names = (copies, self.world_size // copies), ("replicate", "shard")
        mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
        self.mesh = mesh if copies > 1 else mesh["shard"]

    def place(self, model: nn.Module) -> nn.Module:
        """Shard layer by layer; what is not in a layer is a unit of its own.

        By default FSDP2 leaves that unit gathered after a forward pass, for the backward pass. Most passes here have
        none: embeddings and head of each model would stay whole, and rounded to the type in which they compute.
        """
        policy = MixedPrecisionPolicy()
        if "bf16" in str(self.precision_plugin.precision):
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        layers = set(causal_lm(model.model)._no_split_modules or [])  # type: ignore[arg-type]
        for module in list(model.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, mesh=self.mesh, mp_policy=policy)
        fully_shard(model, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        return model

    def whole(self, parameter: Tensor) -> Tensor:
        """A whole weight; all ranks take part."""
        parameter = parameter.detach()
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Sharded weights by name."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict(keep_vars=True)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Numbers as they are, tensors as functions that gather them."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        states: list[dict[str, Any]] = [optimizer.state.get(p, {}) for p in parameters(optimizer)]
        gathering: dict[int, dict[str, Tensor | Callable[[], Tensor]]] = {
            i: {k: partial(self.whole, v) if isinstance(v, DTensor) else v for k, v in state.items()}
            for i, state in enumerate(states)
            if state
        }
        return optimizer_state(gathering, optimizer.param_groups)

    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Set a weight."""
        with torch.no_grad():
            parameter.copy_(_like(whole, parameter))

    def put_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Set the state of an optimizer."""
        grouped = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
        for i, (group, parameter) in enumerate(grouped):
            values, place = {k: stored(v) for k, v in state["state"].get(i, {}).items()}, counts_on(group, parameter)
            optimizer.state[parameter] = {
                k: _like(v, parameter) if getattr(v, "shape", None) == parameter.shape else own(v, place)
                for k, v in values.items()
            }


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    on_device = whole.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
