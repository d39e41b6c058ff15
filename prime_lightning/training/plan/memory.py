"""Memory of one GPU by part, as functions of counts of parameters.

Psi is a number of parameters, N the number of GPUs. Sources: ZeRO (Rajbhandari et al., arXiv 1910.02054, section 3) for
what is kept of a model in mixed precision and how each stage divides it; FSDP2 divides like stage 3.
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
