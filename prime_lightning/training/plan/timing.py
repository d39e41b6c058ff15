"""Time of one iteration, as functions of counts: arithmetic for the trainer, memory bandwidth for the sampler.

These are estimates before anything has run, good for choosing hardware and no promise. Communication, optimizer steps
and verifiers are inside the assumed utilisation. Source of 6 and 2: Kaplan et al., arXiv 2001.08361, section 2.1; of
the attention term: PaLM, arXiv 2204.02311, appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass


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
