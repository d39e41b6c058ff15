"""What a run says of itself in its checkpoints and in the cards of its models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def run_metadata(module: Any) -> dict[str, Any]:
    """What a run says of itself: its module's metadata, the command, iterations, and the last numbers; plain values.

    Args:
        module: A Lightning module inside its trainer, with `metadata()` and `command`.
    """
    metrics = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    return {
        **module.metadata(),
        "command": module.command,
        "iterations": module.trainer.global_step,
        "numbers": {name: value for name, value in metrics.items() if math.isfinite(value)},
    }


def import_path(function: Callable[..., Any]) -> str:
    """Where a function is imported from, for readers.

    Example:
        >>> import_path(run_metadata)
        'prime_lightning.training.run_metadata.run_metadata'
    """
    function = getattr(function, "func", function)  # of a partial
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
