"""Memory of one GPU and time of one iteration, as functions of counts: before anything has run.

Memory: Psi is a number of parameters, N the number of GPUs. Sources: ZeRO (Rajbhandari et al., arXiv 1910.02054,
section 3) for what is kept of a model in mixed precision and how each stage divides it; FSDP2 divides like stage 3.

Time: arithmetic for the trainer, memory bandwidth for the sampler. These are estimates, good for choosing hardware and
no promise. Communication, optimizer steps and verifiers are inside the assumed utilisation. Source of 6 and 2: Kaplan
et al., arXiv 2001.08361, section 2.1; of the attention term: PaLM, arXiv 2204.02311, appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
LIVE_PARAMETERS = 10**9  # DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a strategy lays a model over GPUs."""

    name: str = "one GPU"
    """For the reader."""
    gpus: int = 1
    replicas: int = 1
    """Whole copies of each model, each divided over the same number of GPUs."""
    stage: int = 0
    """0: a whole copy each; 1 divides the optimizer's state, 2 gradients too, 3 (and FSDP2) parameters too."""
    masters: bool = False
    """The optimizer has a float32 copy of its own (DeepSpeed), whatever the weights are."""
    gradient_width: int | None = None
    """Bytes of a gradient, where sums of gradients have a type of their own."""
    offload_optimizer: bool = False
    """Optimizer state and masters live in the host's memory."""
    replicate_frozen: bool = False
    """Models without an optimizer are whole on each GPU under stage 3, too."""
    offload_parameters: bool = False
    """Parameters live in the host's memory."""

    def share(self, stage: int) -> int:
        """By how much something is divided that is divided from `stage` on."""
        return self.gpus // self.replicas if self.stage >= stage else 1


def parameter_bytes(parameters: int, width: int, sharding: Sharding) -> float:
    """`width * Psi`, over N from stage 3 on.

    Example:
        >>> parameter_bytes(10, 2, Sharding(gpus=5, stage=3))
        4.0
    """
    return 0.0 if sharding.offload_parameters else width * parameters / sharding.share(3)


def gradient_bytes(parameters: int, width: int, sharding: Sharding) -> float:
    """`width * Psi`, over N from stage 2 on: gradients have the type of the weights, or one of their own."""
    return (sharding.gradient_width or width) * parameters / sharding.share(2)


def moment_bytes(parameters: int, moments: int, width: int, sharding: Sharding) -> float:
    """`moments * width * Psi`, over N from stage 1 on; float32 under DeepSpeed, else of the weights' type.

    AdamW has two moments (Kingma and Ba, arXiv 1412.6980, Algorithm 1).
    """
    width = 4 if sharding.masters else width
    return 0.0 if sharding.offload_optimizer else moments * width * parameters / sharding.share(1)


def master_bytes(parameters: int, sharding: Sharding) -> float:
    """`4 * Psi`, over N from stage 1 on, where the optimizer has a float32 copy of its own."""
    return 4 * parameters / sharding.share(1) if sharding.masters and not sharding.offload_optimizer else 0.0


def gathered_bytes(parameters: int, largest_unit: int, width: int, sharding: Sharding) -> float:
    """Parameters that are whole for a moment: under DeepSpeed as many as may live, under FSDP2 two layers."""
    if sharding.stage < 3:
        return 0.0
    return width * (min(parameters, LIVE_PARAMETERS) if sharding.masters else min(parameters, 2 * largest_unit))


def host_bytes(parameters: int, moments: int, width: int, sharding: Sharding) -> float:
    """What one rank keeps in the host's memory: offloaded state (`4 * (1 + moments) * Psi / N`) and parameters."""
    optimizer = 4 * (1 + moments) * parameters / sharding.share(1) if sharding.offload_optimizer else 0.0
    return optimizer + (width * parameters / sharding.share(3) if sharding.offload_parameters else 0.0)


def loading_bytes(parameters: int, width: int, sharding: Sharding) -> float:
    """`width * Psi` of the host, where each rank loads a model whole before it is spread: all but ZeRO-3."""
    return 0.0 if sharding.masters and sharding.stage == 3 else width * parameters


def cache_bytes(sequences: int, tokens: int, cache_width: int, width: int) -> int:
    """Keys and values of `sequences` samples of `tokens` tokens: `2 * layers * kv_heads * head_dim` numbers a token.

    Pope et al., arXiv 2211.05102, section 3.3 (multi-query) with `kv_heads` heads.
    """
    return sequences * tokens * cache_width * width


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU and what is assumed of it."""

    flops: float = 312e12
    """Peak operations a second in the arithmetic of the run (A100, A800: bfloat16, dense)."""
    bandwidth: float = 2.0e12
    """Bytes a second between memory and processor (A100, A800 with 80 GB)."""
    utilisation: float = 0.4
    """Share of `flops` that training reaches (MFU)."""
    sampling_efficiency: float = 0.5
    """Share of the bandwidth (or of the arithmetic) that sampling reaches."""


def matrix_parameters(parameters: int, lookup: int) -> int:
    """Parameters that are multiplied for each token: all but an input embedding that is only looked up."""
    return parameters - lookup


def forward_flops(matrix: int, layers: int, hidden: int, tokens: float, length: float) -> float:
    """`(2 N + 2 * layers * hidden * length) * tokens`: products with N weights, and causal attention.

    A token at place s attends to s others, twice (scores and values), 2 operations each: `4 * hidden * s`; half of
    `length` on average.

    Example:
        >>> forward_flops(100, 1, 10, tokens=5, length=0)
        1000.0
    """
    return (2.0 * matrix + 2.0 * layers * hidden * length) * tokens


def training_flops(forward: float, *, checkpointing: bool, adapters: bool = False) -> float:
    """Three forwards' worth (`6 N` a token), and one more where activations are computed again.

    Under adapters the gradients of the frozen weights, one forward's worth, are not computed.
    """
    return (3.0 + checkpointing - adapters) * forward


def training_seconds(flops: float, gpus: int, hardware: Hardware) -> float:
    """Operations over what all GPUs do in a second."""
    return flops / (gpus * hardware.flops * hardware.utilisation)


def sampling_seconds(
    tokens: float,
    *,
    running: float,
    length: float,
    weight_bytes: float,
    cache_bytes_per_token: float,
    forward_flops_per_token: float,
    gpus: int,
    hardware: Hardware,
) -> float:
    """Seconds until `tokens` tokens are sampled, each GPU working on `running` samples at a time.

    One step makes one token of each running sample and takes the longer of reading weights and caches once,
    `(weight_bytes + running * length / 2 * cache_bytes_per_token) / bandwidth`, and computing,
    `running * forward_flops_per_token / flops` (Pope et al., arXiv 2211.05102, section 2).

    Args:
        tokens: Response tokens, over all GPUs.
        running: Samples that a GPU works on at a time.
        length: Tokens of a finished sample with its prompt.
        weight_bytes: Of the engine's weights on one GPU.
        cache_bytes_per_token: Keys and values of one token.
        forward_flops_per_token: Operations of one token.
        gpus: Engines' GPUs.
        hardware: Of each of them.
    """
    reading = (weight_bytes + running * length / 2 * cache_bytes_per_token) / hardware.bandwidth
    computing = running * forward_flops_per_token / hardware.flops
    step = max(reading, computing) / hardware.sampling_efficiency
    return tokens / (gpus * running) * step
