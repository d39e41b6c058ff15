"""The parts put together: peak memory of one GPU, what would make a run fit, seconds and cost of an iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from prime_lightning.training.plan import estimates
from prime_lightning.training.plan.estimates import Hardware
from prime_lightning.training.plan.setup import Setup
from prime_lightning.training.plan.shape import logits_bytes, work_bytes

CONTEXT = 1.5 * estimates.GIB  # CUDA context, NCCL buffers and cuBLAS workspace; assumed
WORTH = 0.99


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU."""

    models: dict[str, dict[str, float]]
    """`models[part][role]`: what stays throughout."""
    training: dict[str, float]
    """What is there while a model is updated."""
    sampling: dict[str, float]
    """What is there while the engine samples."""
    held: dict[str, float]
    """Of the engine and of CUDA, throughout."""
    host: float
    """Of the host, for each rank."""
    loading: float
    """Of the host, for each rank, while the largest model is loaded."""

    @property
    def kept(self) -> float:
        """What stays throughout."""
        return sum(sum(row.values()) for row in self.models.values()) + sum(self.held.values())

    @property
    def peak(self) -> float:
        """The larger of the two phases; they take turns."""
        return self.kept + max(sum(self.training.values()), sum(self.sampling.values()))


def memory_of(setup: Setup, gpu_bytes: float) -> Memory:
    """Memory of one GPU by part."""
    shard, width = setup.sharding, setup.width
    counts = setup.trainable
    gradients = {role: estimates.gradient_bytes(n, width, shard) for role, n in counts.items()}
    models = {
        "parameters": {role: _parameters(setup, role) for role in setup.shapes},
        "gradients": gradients if shard.masters else {},
        "optimizer moments": {r: estimates.moment_bytes(n, setup.moments[r], width, shard) for r, n in counts.items()},
        "float32 masters": {role: estimates.master_bytes(n, shard) for role, n in counts.items()},
    }
    gathered = [estimates.gathered_bytes(s.parameters, s.largest_unit, width, shard) for s in setup.shapes.values()]
    logits = max(_logits(setup, role) for role in setup.trained)
    work = max(_work(setup, role) for role in setup.trained)
    held, sampling = _engine(setup, gpu_bytes)
    return Memory(
        models=models,
        training={
            "gathered parameters": max(gathered),
            "gradients (one model at a time)": 0.0 if shard.masters else max(gradients.values()),
            "activations": work - logits,
            "logits": logits,
        },
        sampling=sampling,
        held={**held, "CUDA context, NCCL (assumed)": CONTEXT},
        host=sum(estimates.host_bytes(n, setup.moments[role], width, shard) for role, n in counts.items()),
        loading=max(estimates.loading_bytes(s.parameters, setup.loaded.itemsize, shard) for s in setup.shapes.values()),
    )


def _parameters(setup: Setup, role: str) -> float:
    """Bytes of a model's weights; a frozen one may be whole where trained ones are divided."""
    whole = setup.sharding.replicate_frozen and role not in setup.trained
    shard = replace(setup.sharding, stage=0, offload_parameters=False) if whole else setup.sharding
    return estimates.parameter_bytes(setup.stored(role), setup.width, shard)


def _work(setup: Setup, role: str) -> float:
    return work_bytes(
        setup.configs[role],
        setup.micro_tokens[role],
        setup.chunk_tokens,
        setup.weights,
        autocast=setup.autocast,
        checkpointing=setup.checkpointing,
        head=setup.head_dtype,
    )


def _logits(setup: Setup, role: str) -> float:
    chunk = min(setup.chunk_tokens, setup.micro_tokens[role])
    return logits_bytes(setup.shapes[role], chunk, setup.weights, autocast=setup.autocast, head=setup.head_dtype)


def _engine(setup: Setup, gpu_bytes: float) -> tuple[dict[str, float], dict[str, float]]:
    """What the engine holds throughout, and what it takes while it samples."""
    sampler, shape = setup.sampler, setup.shapes["policy"]
    if not sampler.beside:
        return {}, {}
    weights = shape.parameters * sampler.width / sampler.tensor_parallel
    if sampler.fraction is not None:
        return {
            "engine: weights": weights,
            "engine: keys and values": max(sampler.fraction * gpu_bytes - weights, 0),
        }, {}
    length = setup.prompt_tokens + setup.response_tokens
    running = min(sampler.sequences, setup.groups * setup.samples // setup.sharding.gpus)
    cache = estimates.cache_bytes(running, length, shape.cache_width, sampler.width)
    return {"engine: weights": weights}, {"engine: keys and values": cache}


# ---- what would make it fit


def switches(setup: Setup) -> Iterator[tuple[str, Callable[[Setup], Setup]]]:
    """Changes that save memory, cheapest first, by what to write."""
    longest = setup.prompt_tokens + setup.response_tokens
    micro = max(setup.micro_tokens.values())
    less = max(longest, micro // 4)
    fraction = setup.sampler.fraction
    if not setup.checkpointing:
        yield "model.loading.gradient_checkpointing: true", lambda s: replace(s, checkpointing=True)
    if less < micro:
        yield (
            f"model.*_update.micro_tokens: {less}",
            lambda s: replace(s, micro_tokens={r: min(less, n) for r, n in s.micro_tokens.items()}),
        )
    if setup.chunk_tokens > 512:
        yield "model.loading.chunk_tokens: 512", lambda s: replace(s, chunk_tokens=512)
    if setup.head_dtype is not None:
        yield "model.loading.head_dtype: null", lambda s: replace(s, head_dtype=None)
    if setup.sampler.beside and fraction is None and setup.sampler.sequences > 64:
        yield "data.engine.init_args.batch_size: 64", lambda s: replace(s, sampler=replace(s.sampler, sequences=64))
    if setup.sampler.beside and fraction is not None and fraction > 0.3:
        yield (
            "data.engine.init_args.gpu_memory_utilization: 0.3",
            lambda s: replace(s, sampler=replace(s.sampler, fraction=0.3)),
        )
    yield from _strategies(setup)
    if "reference" in setup.shapes and not setup.shared_reference:
        yield "model.reference: null (appendix B.1 of the paper)", without_reference


def _strategies(setup: Setup) -> Iterator[tuple[str, Callable[[Setup], Setup]]]:
    shard = setup.sharding
    if shard.replicas > 1:
        flat = replace(shard, name="FSDP2", replicas=1)
        yield "trainer.strategy.init_args.replicas: 1", lambda s: replace(s, sharding=flat)
    if shard.gpus > 1 and shard.stage < 3:
        zero3 = replace(shard, name="ZeRO-3", stage=3, masters=True)
        yield "ZeRO-3 over the same GPUs", lambda s: replace(s, sharding=zero3, **_half(s))
    if not shard.offload_optimizer:
        offload = replace(shard, name="ZeRO-3, offload", replicas=1, stage=3, masters=True, offload_optimizer=True)
        yield (
            "ZeRO-3 with the optimizer's state in the host's memory",
            lambda s: replace(s, sharding=offload, **_half(s)),
        )
    yield (
        f"{4 * shard.gpus} GPUs under ZeRO-3",
        lambda s: replace(
            s,
            sharding=replace(s.sharding, gpus=4 * shard.gpus, replicas=1, name="ZeRO-3", stage=3, masters=True),
            **_half(s),
        ),
    )


def _half(setup: Setup) -> dict[str, Any]:
    """DeepSpeed computes in bfloat16 weights where Lightning would cast them for each product."""
    return {"weights": torch.bfloat16, "autocast": False} if setup.autocast else {}


def without_reference(setup: Setup) -> Setup:
    """The same run with the policy as its reference."""
    kept = {role: shape for role, shape in setup.shapes.items() if role != "reference"}
    return replace(setup, shapes=kept)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One change."""

    words: str
    alone: float
    """Peak bytes with this change only."""
    together: float
    """Peak bytes with all changes up to this one."""


def switched(setup: Setup, gpu_bytes: float) -> list[Switch]:
    """Each change alone, and with those above it; changes that save less than a hundredth are left out."""
    found, together, peak = [], setup, memory_of(setup, gpu_bytes).peak
    for words, change in switches(setup):
        changed = change(together)
        less = memory_of(changed, gpu_bytes).peak
        if less <= WORTH * peak:
            together, peak = changed, less
            found.append(Switch(words=words, alone=memory_of(change(setup), gpu_bytes).peak, together=less))
    return found


# ---- time


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What an iteration's rollouts are assumed to be like."""

    prompt: float
    """Mean tokens of a prompt."""
    response: float
    """Mean tokens of a response."""
    acceptance: float
    """Share of the sampled groups that the accuracy filter keeps."""


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """Seconds of one iteration."""

    sampling: float
    scoring: float
    training: float
    running: float
    """Samples that a GPU works on at a time."""

    @property
    def seconds(self) -> float:
        """They take turns."""
        return self.sampling + self.scoring + self.training


def iteration_of(setup: Setup, rollouts: Rollouts, hardware: Hardware, gpu_bytes: float) -> Iteration:
    """Seconds of sampling, scoring and training."""
    gpus, rows, length = setup.sharding.gpus, setup.groups * setup.samples, rollouts.prompt + rollouts.response

    def forward(role: str, tokens: float) -> float:
        shape = setup.shapes[role]
        matrix = estimates.matrix_parameters(shape.parameters, shape.lookup)
        return estimates.forward_flops(matrix, shape.layers, shape.hidden, tokens, length)

    prompts = setup.groups if setup.shared_prompts else rows
    tokens = prompts * rollouts.prompt + rows * rollouts.response
    scored = sum(count * forward(role, tokens) for role, count in setup.scored.items())
    trained = sum(
        setup.epochs[role]
        * estimates.training_flops(
            forward(role, tokens), checkpointing=setup.checkpointing, adapters=setup.adapted(role)
        )
        for role in setup.trained
    )
    running = running_samples(setup, rollouts, gpu_bytes)
    sampler, policy = setup.sampler, setup.shapes["policy"]
    sampling = estimates.sampling_seconds(
        rows * rollouts.response / rollouts.acceptance,
        running=running,
        length=length,
        weight_bytes=policy.parameters * sampler.width / sampler.tensor_parallel,
        cache_bytes_per_token=policy.cache_width * sampler.width / sampler.tensor_parallel,
        forward_flops_per_token=forward("policy", 1.0) / sampler.tensor_parallel,
        gpus=max(1, gpus // sampler.tensor_parallel),
        hardware=hardware,
    )
    seconds = [estimates.training_seconds(flops, gpus, hardware) for flops in (scored, trained)]
    return Iteration(sampling=sampling, scoring=seconds[0], training=seconds[1], running=running)


def running_samples(setup: Setup, rollouts: Rollouts, gpu_bytes: float) -> float:
    """Samples of one engine at a time: as many as it takes, as there are, and as its cache holds."""
    sampler = setup.sampler
    engines = max(1, setup.sharding.gpus // sampler.tensor_parallel)
    there = setup.groups * setup.samples / rollouts.acceptance / engines
    held, _ = _engine(setup, gpu_bytes)
    cache = held.get("engine: keys and values")
    a_sample = estimates.cache_bytes(1, 1, setup.shapes["policy"].cache_width, sampler.width) * (
        rollouts.prompt + rollouts.response
    )
    fitting = float("inf") if cache is None else cache * sampler.tensor_parallel / a_sample
    return max(1.0, min(sampler.sequences, there, fitting))
