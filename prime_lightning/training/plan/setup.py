"""What a parsed configuration of `fit` says about memory and time; nothing of it is instantiated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from transformers import PretrainedConfig

from prime_lightning.engines.number_format import dtype_of
from prime_lightning.models.kernels import check_kernels
from prime_lightning.models.options import Loading, precision_of
from prime_lightning.training.options import PolicyLoss, Replaying, Update, check_share_base
from prime_lightning.training.plan.estimates import Sharding
from prime_lightning.training.plan.shape import Shape, adapter_parameters, read_config, shape_of
from prime_lightning.training.strategies.placement import copies_of

TRAINED = ("policy", "prm", "critic")
ROLES = (*TRAINED, "reference")
MOMENTS = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "RMSprop": 1, "Adagrad": 1, "Lion": 1}
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The engine, as far as memory and time go."""

    name: str
    width: int = 4
    """Bytes of a weight, and of a key or value."""
    sequences: int = 256
    """Samples at a time."""
    fraction: float | None = None
    """Share of the GPU that it takes and keeps; None takes what it needs while it samples."""
    tensor_parallel: int = 1
    beside: bool = True
    """Whether it is on the trainer's GPUs."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run."""

    configs: Mapping[str, PretrainedConfig]
    """Of each model by its role."""
    shapes: Mapping[str, Shape]
    trained: tuple[str, ...]
    """Roles that have an optimizer."""
    trainable: Mapping[str, int]
    """Parameters of each trained role that have gradients: all of them, or those of its adapters."""
    moments: Mapping[str, int]
    """Moments of each trained role's optimizer."""
    sharding: Sharding
    weights: torch.dtype
    """Type of the weights that forward and backward see."""
    loaded: torch.dtype
    """Type that weights are loaded in."""
    head_dtype: str | None
    """Type of the projection onto the vocabulary, where it has one of its own."""
    autocast: bool
    checkpointing: bool
    chunk_tokens: int
    micro_tokens: Mapping[str, int]
    """Most tokens of a micro-batch, for each trained role."""
    epochs: Mapping[str, int]
    sampler: Sampler
    groups: int
    """Prompts of an iteration."""
    samples: int
    prompt_tokens: int
    """Of the longest prompt."""
    response_tokens: int
    """Of the longest response."""
    shared_reference: bool
    """The reference is the policy below its adapters."""
    shared_base: bool
    """The PRM's adapters stand on the policy's weights."""
    shared_prompts: bool
    """A prompt is run once for all of its responses."""
    scored: Mapping[str, int]
    """Passes without gradient of each role in an iteration, see docs/concepts.md."""

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return self.weights.itemsize

    def adapted(self, role: str) -> bool:
        """Whether a role trains adapters."""
        return role in self.trained and self.trainable[role] < self.shapes[role].parameters

    def stored(self, role: str) -> int:
        """Parameters that a role keeps, its adapters included."""
        if role == "reference" and self.shared_reference:
            return 0
        if role == "prm" and self.shared_base:
            return self.trainable[role]
        return self.shapes[role].parameters + (self.trainable[role] if self.adapted(role) else 0)


def setup_of(config: Any, gpus: int | None, files: Mapping[str, str]) -> Setup:
    """Read a parsed configuration.

    Args:
        config: jsonargparse's namespace of `fit`.
        gpus: Instead of the configuration's own number.
        files: config.json by role; that of "" is for all roles.

    Raises:
        ValueError: if a run would refuse the precision, the kernels, the strategy or a model, a configuration cannot be
            read, the number of GPUs is not known, or the prompts of an iteration cannot be shared among them.
    """
    model, data, trainer = config.model, config.data, config.trainer
    loading = Loading(**model.loading.as_dict())
    named = {role: model.get(role) for role in ROLES if model.get(role)}
    if model.share_base:
        check_shared(model, trainer)
    made = {role: read_config(name, files.get(role, files.get(""))) for role, name in named.items()}
    trained = tuple(r for r in TRAINED if r in named and not (r == "prm" and model.process_reward["update"] == "none"))
    sharding = sharding_of(trainer, _gpus(trainer) if gpus is None else gpus)
    check_kernels(loading.kernels, gathers_weights=sharding.masters and sharding.stage == 3)
    if data.prompts_per_batch % sharding.gpus:
        raise ValueError(
            f"Expected `data.prompts_per_batch` to be divisible by the number of GPUs, got {data.prompts_per_batch} "
            f"prompts on {sharding.gpus} GPUs."
        )
    mixed = precision_of(trainer.precision) == "bf16-mixed"
    half = sharding.masters and mixed
    longest = data.max_prompt_tokens + data.sampling.max_tokens
    updates = {role: model[f"{role}_update"] for role in trained}
    shapes = {role: shape_of(config, loading.attention) for role, config in made.items()}
    adapters = {role: model.get(f"{role}_lora") for role in trained if model.get(f"{role}_lora")}
    adapted = {r: adapter_parameters(made[r], lora.rank, lora.target_modules) for r, lora in adapters.items()}
    unit = {"prm": data.sampling.samples if _whole_groups(model.prm_loss) else 1}
    return Setup(
        configs=made,
        shapes=shapes,
        trained=trained,
        trainable={role: adapted.get(role, shapes[role].parameters) for role in trained},
        moments={role: _moments(model[f"{role}_optimizer"]) for role in trained},
        sharding=sharding,
        weights=torch.bfloat16 if half else getattr(torch, loading.dtype),
        loaded=getattr(torch, loading.dtype),
        head_dtype=loading.head_dtype,
        autocast=mixed and not half,
        checkpointing=loading.gradient_checkpointing,
        chunk_tokens=loading.chunk_tokens,
        micro_tokens={role: max(updates[role].micro_tokens, longest * unit.get(role, 1)) for role in trained},
        epochs={r: updates[r].epochs * (1 + (replaying(model).passes if r == "prm" else 0)) for r in trained},
        sampler=sampler_of(data.engine),
        groups=data.prompts_per_batch,
        samples=data.sampling.samples,
        prompt_tokens=data.max_prompt_tokens,
        response_tokens=data.sampling.max_tokens,
        shared_reference="policy" in adapted and named.get("reference") == named["policy"],
        shared_base=bool(model.share_base),
        shared_prompts=loading.shares_prompts,
        scored={role: n for role, n in scored_passes(model, data.sampling.temperature or 1.0).items() if role in named},
    )


def check_shared(model: Any, trainer: Any) -> None:
    """Refuse, as a run would, to keep the frozen weights of policy and PRM once.

    Args:
        model: The module's part of the configuration.
        trainer: The trainer's.

    Raises:
        ValueError: if the models or the strategy do not allow it.
    """
    check_share_base({role: model.get(role) for role in ROLES}, {r: model.get(f"{r}_lora") for r in ("policy", "prm")})
    sharding = sharding_of(trainer, 1)
    if sharding.stage or sharding.masters:
        raise ValueError(f"Expected a strategy that keeps whole models with `share_base: true`, got {sharding.name}.")


def scored_passes(model: Any, temperature: float) -> dict[str, int]:
    """Passes without gradient that `PrimeModule` makes with each of its models, the first batch's comparison left out.

    Args:
        model: The module's part of the configuration.
        temperature: Of the sampling.
    """
    update = {role: Update(**model[f"{role}_update"].as_dict()) for role in ("policy", "prm")}
    loss, rewards = PolicyLoss(**model.policy_loss.as_dict()), model.process_reward["update"]
    against = model.process_reward["against"] == "policy"
    relative, at_one = bool(model.prm and (against or not model.reference)), temperature == 1.0
    early = loss.proximal == "trainer" and not loss.in_one_pass(update["policy"], relative and at_one)
    replay = replaying(model)
    again = replay.passes if replay.reference == "present" and model.prm else 0
    return {
        "policy": early + (relative and not at_one) + again,
        "prm": int(not (rewards == "after" and update["prm"].one_step)),
        "reference": 1 + (not at_one),
        "critic": 1,
    }


def replaying(model: Any) -> Replaying:
    """How past lessons of the PRM are passed over; not at all where none are kept.

    Args:
        model: The module's part of the configuration.
    """
    options = Replaying(**model.process_reward["replay"].as_dict())
    return options if options.iterations else Replaying(passes=0)


def sharding_of(trainer: Any, gpus: int) -> Sharding:
    """What the strategy divides, from its name or its class and arguments."""
    strategy = trainer.strategy
    options = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
    words = strategy if isinstance(strategy, str) else strategy.class_path.rsplit(".", 1)[-1]
    low = words.lower()
    if "deepspeed" in low:
        digits = [int(c) for c in low if c.isdigit()]
        stage = options.get("stage", digits[0] if digits else 2)
        return Sharding(
            name=f"ZeRO-{stage}",
            gpus=gpus,
            stage=stage,
            masters=True,
            gradient_width=4 if stage and options.get("gradient_dtype", "float32") == "float32" else None,
            replicate_frozen=options.get("frozen") == "replicate",
            offload_optimizer=bool(options.get("offload_optimizer", "offload" in low)),
            offload_parameters=bool(options.get("offload_parameters", "offload" in low and stage == 3)),
        )
    if "fsdp" in low or "modelparallel" in low:
        copies = copies_of(options.get("replicas", 1), int(trainer.num_nodes), gpus)
        return Sharding(name=f"FSDP2 x {copies}" if copies > 1 else "FSDP2", gpus=gpus, replicas=copies, stage=3)
    return Sharding(name="DDP" if gpus > 1 else "one GPU", gpus=gpus)


def sampler_of(engine: Any) -> Sampler:
    """The engine's share of the GPU."""
    options, name = engine.get("init_args") or {}, engine.class_path.rsplit(".", 1)[-1]
    dtype = dtype_of(options.get("dtype") or "auto", cuda=options.get("device") != "cpu")
    width = WIDTH.get(dtype, 4)
    if name in ("VLLMEngine", "SharedVLLMEngine"):
        return Sampler(
            name=name,
            width=width,
            sequences=options["max_sequences"],
            fraction=options["gpu_memory_utilization"],
            tensor_parallel=options["tensor_parallel"],
            beside=options["devices"] is None,
        )
    return Sampler(name=name, width=width, sequences=options.get("batch_size", 256), beside=name != "ServerEngine")


def _gpus(trainer: Any) -> int:
    devices = trainer.devices
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 0
    if count < 1:
        raise ValueError(f"Expected `trainer.devices` to be a number, got {devices!r}. Give --gpus.")
    return count * int(trainer.num_nodes)


def _moments(optimizer: Any) -> int:
    """Numbers that the optimizer keeps of each parameter; 2 for one that is not known."""
    name = optimizer.class_path.rsplit(".", 1)[-1] if hasattr(optimizer, "class_path") else "AdamW"
    if name == "SGD":
        return int(bool(optimizer.init_args.momentum))
    return MOMENTS.get(name, 2)


def _whole_groups(path: Any) -> bool:
    """Whether a PRM loss needs all responses of a prompt in one micro-batch."""
    if isinstance(path, str):
        module, name = path.rsplit(".", 1)
        path = getattr(import_module(module), name)
    return bool(getattr(path, "whole_groups", True))
