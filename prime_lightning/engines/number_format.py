"""The number format of an engine's weights."""

from __future__ import annotations

import warnings

LARGE = 1_000_000_000  # parameters from which float32 on a GPU is a mistake more often than a wish


def dtype_of(dtype: str, cuda: bool) -> str:
    """The format that `auto` stands for: bfloat16 on GPUs, float32 on a CPU.

    Example:
        >>> dtype_of("auto", cuda=True), dtype_of("auto", cuda=False), dtype_of("float16", cuda=True)
        ('bfloat16', 'float32', 'float16')
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if cuda else "float32"


def warn_of_float32(dtype: str, cuda: bool, parameters: int) -> None:
    """Say so where a large model would be sampled from in float32 on a GPU.

    Args:
        dtype: Of the engine's weights.
        cuda: Whether it is on GPUs.
        parameters: Of its model.
    """
    if cuda and dtype == "float32" and parameters > LARGE:
        warnings.warn(
            f"The engine's dtype is float32 for {parameters / 1e9:.1f} B parameters: {4 * parameters / 2**30:.0f} GiB "
            "of GPU memory for weights, and attention without its fast kernels. Leave it at auto (bfloat16).",
            stacklevel=3,
        )
