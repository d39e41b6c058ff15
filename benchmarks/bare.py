"""A trainer that does nothing beside its iterations, for benchmarks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def bare_trainer(*callbacks: pl.Callback, steps: int, **options: Any) -> pl.Trainer:
    """No log, no checkpoint, no output; on one CPU unless the options say otherwise."""
    settings: dict[str, Any] = {
        "max_steps": steps,
        "accelerator": "cpu",
        "devices": 1,
        "callbacks": [*callbacks],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**(settings | options))
