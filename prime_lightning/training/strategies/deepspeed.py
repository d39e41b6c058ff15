"""DeepSpeed with one engine per model. The only file that names DeepSpeed.

Lightning's own strategy has one engine around the whole module, one optimizer, and wants CUDA. Here each trained model
of the module becomes an engine of its own under its old name, a frozen one is replicated or, under ZeRO-3, sharded, and
all of it runs on CPUs, too. The module calls `self.policy(...)`, `self.manual_backward(loss)` and
`self.devices.clipped_step(...)` as under any other strategy.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, _init_optimizers_and_lr_schedulers
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer

from prime_lightning.training.stepping import parameters
from prime_lightning.training.strategies.checkpoint import Stored, stored
from prime_lightning.training.strategies.ddp_fsdp import Sharded, average_gradients, counts_on, optimizer_state, own
from prime_lightning.training.strategies.placement import (
    models_of,
    owners_of,
    replace_parameters,
    restore_buffers,
    settle,
)
from prime_lightning.training.strategies.zero import Config, check_partition, exact_sums, merged, stage_of

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is first imported


class RolePrecision(DeepSpeedPrecision):
    """Leaves models and batches as they are: engines cast their own parameters, and log-probs stay float32."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Lightning's casts buffers too, such as the frequencies of rotary embeddings."""
        return module

    def convert_input(self, data: Any) -> Any:
        """Lightning's casts every float tensor of a batch."""
        return data

    def clip_gradients(self, optimizer: Optimizer, clip_val: float | None = 0.0, *_: Any, **__: Any) -> None:
        """Tell the engine's optimizer by how much to clip in its next step."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        optimizer.clip_grad = float(clip_val or 0.0)  # type: ignore[attr-defined]


class PrimeDeepSpeedStrategy(Sharded, DeepSpeedStrategy):
    """ZeRO 0 to 3 for modules with several models.

    Args:
        stage: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too.
        roles: Overrides of the DeepSpeed config by the name of a model, such as
            `{prm: {zero_optimization: {offload_optimizer: {device: cpu}}}}`.
        frozen: Under stage 3, spread models without an optimizer over the devices, too, or replicate them.
        overlap_comm: Overlap communication with computation; for stages 2 and 3.
        gradient_dtype: Of the sums of gradients over micro-batches and ranks, stages 1 to 3. In bfloat16 a small term
            is lost beside a large sum: 1 + 2^-9 is 1.
        kwargs: As for Lightning's `DeepSpeedStrategy`; its `config` replaces all other options.

    Raises:
        ValueError: if DeepSpeed is not installed, parameters of an optimizer belong to several models or to none,
            `roles` names none of the models, or the combination is impossible.
    """

    def __init__(
        self,
        *,
        stage: Literal[0, 1, 2, 3] = 2,
        roles: dict[str, Config] | None = None,
        frozen: Literal["shard", "replicate"] = "shard",
        overlap_comm: bool = True,
        gradient_dtype: Literal["float32", "bfloat16"] = "float32",
        **kwargs: Any,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError('Expected DeepSpeed, got no module `deepspeed`: pip install "prime-lightning[deepspeed]".')
        super().__init__(stage=stage, overlap_comm=overlap_comm, **kwargs)
        self.roles, self.frozen, self.gradient_dtype = roles or {}, frozen, gradient_dtype
        self.engines: dict[str, Any] = {}
        self._trained: dict[int, str] = {}  # role of each optimizer, by its id
        self._order: dict[str, list[nn.Parameter]] = {}  # parameters of a role as its optimizer numbers them
        self._sizes: dict[str, list[int]] = {}  # and how many there are in each of its groups
        self._forwarded: str | None = None  # the role whose forward pass awaits its backward pass

    def setup_environment(self) -> None:
        """As Lightning's, without its refusal of CPUs."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """As Lightning's, without its check of GPU numbers on CPUs."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:
            from deepspeed import ops

            ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at its first use; gloo does without
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    @property
    def precision_plugin(self) -> DeepSpeedPrecision:
        """Ours in the place of the one that Lightning chooses for all DeepSpeed strategies."""
        plugin = self._precision_plugin
        if not isinstance(plugin, RolePrecision):
            plugin = self._precision_plugin = RolePrecision(plugin.precision if plugin else "32-true")  # type: ignore[arg-type]
        return plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        self._precision_plugin = plugin

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Around `configure_model`: under ZeRO-3 `from_pretrained` puts weights straight into their shards."""
        if not self.zero_stage_3:
            yield
            return
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        self._init_config_if_needed()
        kept = HfDeepSpeedConfig(copy.deepcopy(self.config))  # transformers refers to it weakly
        try:
            yield
        finally:
            unset_hf_deepspeed_config()  # an engine's own copy of the model is an ordinary one
            del kept
        restore_buffers(self.lightning_module)

    def setup(self, trainer: Any) -> None:
        """Make the engines; after `fit`, `validate` and `test` use those that are there."""
        assert self.accelerator is not None
        module = self.lightning_module
        assert module is not None
        self._init_config_if_needed()
        self.accelerator.setup(trainer)
        if self.engines and trainer.state.fn != TrainerFn.FITTING:
            for role, engine in self.engines.items():
                setattr(module, role, engine)
            return
        self._prepare(module)
        fitting = trainer.state.fn == TrainerFn.FITTING
        optimizers, self.lr_scheduler_configs = _init_optimizers_and_lr_schedulers(module) if fitting else ([], [])
        owners = owners_of(module, optimizers)
        self.optimizers = [self._train(role, optimizer) for role, optimizer in zip(owners, optimizers, strict=True)]
        for role, model in models_of(module).items():
            if role not in owners:
                self._freeze(role, model)
        self._set_deepspeed_activation_checkpointing()
        self.barrier()

    def _prepare(self, module: Any) -> None:
        """What Lightning's strategy does to the module as a whole; here each model is moved when its engine is made."""
        models = models_of(module)
        if unknown := sorted(self.roles.keys() - models.keys()):
            raise ValueError(f"Expected `roles` of the strategy to name some of {sorted(models)}, got {unknown}.")
        settle(module, self.root_device)
        for role, model in models.items():
            if stage_of(self.config_of(role)) < 3:
                self._unshard(model)

    def config_of(self, role: str) -> Config:
        """The DeepSpeed config of a model."""
        config = merged(self.config or {}, self.roles.get(role, {}))
        if stage_of(config) in (0, 1) and "zero_optimization" in config:
            config["zero_optimization"]["overlap_comm"] = False  # DeepSpeed has it from stage 2 on
        return config

    def _unshard(self, model: nn.Module) -> None:
        """Ordinary parameters for a model that is not to be sharded, while others are."""
        replace_parameters(model, lambda parameter: hasattr(parameter, "ds_id"), self.whole)

    def _train(self, role: str, optimizer: Optimizer) -> Any:
        """An engine for a trained model; returns the optimizer that it makes of the given one."""
        self._order[role] = parameters(optimizer)
        self._sizes[role] = [len(group["params"]) for group in optimizer.param_groups]
        engine, wrapped = self._initialize(role, self.config_of(role), optimizer)
        engine.register_forward_hook(partial(self._forward_ran, role))
        self._trained[id(wrapped)] = role
        return wrapped

    def _freeze(self, role: str, model: nn.Module) -> None:
        """A model that is not trained: a sharded inference engine, or a replica."""
        config = self.config_of(role)
        if stage_of(config) == 3 and self.frozen == "shard":
            kept = {"train_micro_batch_size_per_gpu", "fp16", "bf16", "zero_optimization"}
            config = {name: value for name, value in config.items() if name in kept}
            zero = {name: value for name, value in config["zero_optimization"].items() if name != "offload_optimizer"}
            engine, _ = self._initialize(role, config | {"zero_optimization": zero}, None)
            engine.eval()
            return
        self._unshard(model)
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        low = next((kind for name, kind in kinds.items() if config.get(name, {}).get("enabled")), None)
        for parameter in model.parameters():  # buffers keep their type
            parameter.data = parameter.data.to(device=self.root_device, dtype=low)
        model.to(self.root_device)

    def _initialize(self, role: str, config: Config, optimizer: Optimizer | None) -> tuple[Any, Any]:
        import deepspeed

        model = getattr(self.lightning_module, role)
        rank = argparse.Namespace(device_rank=self.root_device.index) if self.root_device.type == "cuda" else None
        updated = [p for p in model.parameters() if p.requires_grad] if optimizer else []
        engine, wrapped, *_ = deepspeed.initialize(
            args=rank, config=config, model=model, optimizer=optimizer, model_parameters=updated,
            dist_init_required=False,
        )  # fmt: skip
        restore_buffers(engine)
        engine.enable_backward_allreduce = engine.zero_optimization()  # stage 0: see `clipped_step`
        self.engines[role] = engine
        setattr(self.lightning_module, role, engine)
        return engine, wrapped

    def _format_batch_size_and_grad_accum_config(self) -> None:
        """Losses are scaled by the module, and a step ends an accumulation of any number of micro-batches."""
        defaults = {"train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False}
        ours = {"gradient_accumulation_steps": 1, "managed_gradient_accumulation": False, "gradient_clipping": 0.0}
        sums = exact_sums() if self.gradient_dtype == "float32" and stage_of(self.config or {}) else {}
        self.config = defaults | sums | (self.config or {}) | ours
        for one in ({}, *self.roles.values()):
            check_partition(merged(self.config, one))
        if stage_of(self.config) == 0 and self.precision_plugin.precision != "32-true":
            raise ValueError("Expected `trainer.precision` 32-true with ZeRO stage 0, or stage 1 to 3 with bfloat16.")

    @property
    def model(self) -> Any:
        """The module, which is never wrapped as a whole."""
        return self._lightning_module

    @model.setter
    def model(self, model: Any) -> None:
        """Nothing to keep."""

    def _forward_ran(self, role: str, *_: Any) -> None:
        if torch.is_grad_enabled():
            assert self._forwarded in (None, role), f"The {self._forwarded} awaits its backward pass."
            self._forwarded = role

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """The backward pass of the engine whose forward pass ran last."""
        assert self._forwarded is not None
        self.engines[self._forwarded].backward(closure_loss)
        self._forwarded = None
        return closure_loss

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The step of the engine."""
        result = closure()
        self.precision_plugin._after_closure(self.lightning_module, optimizer)  # type: ignore[arg-type]
        self.engines[self._trained[id(optimizer)]].step()
        return result

    def clipped_step(self, optimizer: LightningOptimizer, limit: float) -> Tensor:
        """The engine clips, leaves out steps whose gradient is not finite, and tells the norm afterwards."""
        engine = self.engines[self._trained[id(optimizer.optimizer)]]
        if not engine.zero_optimization():
            average_gradients(parameters(optimizer.optimizer))
            return super().clipped_step(optimizer, limit)
        optimizer.optimizer.clip_grad = limit  # type: ignore[attr-defined]
        optimizer.step()
        norm = torch.as_tensor(float(engine.get_global_grad_norm()), device=self.root_device)
        return norm if engine.was_step_applied() else norm * torch.inf

    def whole(self, parameter: Tensor) -> Tensor:
        """A whole weight as forward passes use it; all ranks take part."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            return parameter.detach().clone()

    def master(self, parameter: Tensor) -> Tensor:
        """The whole weight as the optimizer has it, in float32."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter) if _has_master(parameter) else None
        return self.whole(parameter) if full is None else full

    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Set a weight, of the model and of the optimizer."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        whole = whole.to(self.root_device)
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], 0, enabled=hasattr(parameter, "ds_id")):
            parameter.copy_(whole)
        if not _has_master(parameter):
            return
        if hasattr(parameter, "ds_id"):
            safe_set_local_fp32_param(parameter, self._shard(parameter, whole))
        else:
            safe_set_full_fp32_param(parameter, whole.float())

    def _shard(self, parameter: Any, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that is sharded like a parameter under ZeRO-3."""
        size, flat = parameter.ds_tensor.numel(), whole.flatten()
        return pad(flat, (0, size * self.world_size - flat.numel())).narrow(0, size * self.global_rank, size)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights by the names that they have without engines."""
        assert self.lightning_module is not None
        found: dict[str, Any] = {}
        for role, model in self.lightning_module.named_children():
            inner: Any = model.module if model is self.engines.get(role) else model
            found |= {f"{role}.{name}": weight for name, weight in inner.state_dict(keep_vars=True).items()}
        return found

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Numbers as they are, tensors as functions that gather them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        role = self._trained[id(optimizer)]
        flats = _flats(optimizer)
        known = optimizer.state.get(flats[0], {})
        spread = [name for name, value in known.items() if getattr(value, "shape", None) == flats[0].shape]
        single = {name: value for name, value in known.items() if name not in spread}
        get: Callable[[Any, str], Tensor] = safe_get_full_optimizer_state
        if not self.engines[role].zero_optimization():
            get = lambda p, name: optimizer.state[p][name]  # noqa: E731
        states = {
            i: {n: own(v) for n, v in single.items()} | {n: partial(get, parameter, n) for n in spread}
            for i, parameter in enumerate(self._order[role])
            if spread
        }
        groups = [{**g, "params": n * [None]} for g, n in zip(optimizer.param_groups, self._sizes[role], strict=True)]
        return optimizer_state(states, groups)

    def put_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Set the state of an optimizer."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not state["state"]:
            return
        order = self._order[self._trained[id(optimizer)]]
        known = next(iter(state["state"].values()))
        spread = {name for name, value in known.items() if isinstance(value, Stored) or getattr(value, "ndim", 0) > 0}
        for flat in _flats(optimizer):
            place = counts_on(optimizer.param_groups[0], flat)
            optimizer.state[flat] = {
                name: torch.zeros_like(flat, requires_grad=False) if name in spread else own(value, place)
                for name, value in known.items()
            }
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False  # type: ignore[attr-defined]
            optimizer._lazy_init_hp_params_optimizer_state()
        for i, parameter in enumerate(order):
            for name in spread:
                whole = stored(state["state"][i][name]).to(self.root_device)
                if hasattr(parameter, "ds_id"):
                    safe_set_local_optimizer_state(parameter, self._shard(parameter, whole), name)
                elif hasattr(parameter, "_hp_mapping"):
                    safe_set_full_optimizer_state(parameter, whole, name)
                else:  # stage 0
                    optimizer.state[parameter][name].copy_(whole)

    def teardown(self) -> None:
        """Give the module its models back; Lightning's would move parameters away from under the engines."""
        for role, engine in self.engines.items():
            setattr(self.lightning_module, role, engine.module)
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def _has_master(parameter: Tensor) -> bool:
    """Whether a sharding optimizer updates a parameter."""
    return parameter.requires_grad and (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"))


def _flats(optimizer: Any) -> list[Tensor]:
    """The float32 tensors that this rank's part of the optimizer works on."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return list(parameters(optimizer))
