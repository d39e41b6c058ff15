"""PRIME (Process Reinforcement through IMplicit rEwards, arXiv 2502.01456) as a PyTorch Lightning package.

import prime_lightning

run = prime_lightning.train("Qwen/Qwen2.5-0.5B-Instruct", rows, max_steps=20)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = ["ImplicitPRM", "PrimeModule", "RolloutDataModule", "Run", "evaluate", "rerank", "score", "train"]
HOMES = {"ImplicitPRM": "prm.implicit", "PrimeModule": "training.module", "RolloutDataModule": "sampling.datamodule"}
"""Files of the classes; the functions are in `cli.api`."""


def __getattr__(name: str) -> Any:
    """What users import, imported when it is first asked for."""
    if name in __all__:
        return getattr(import_module(f"prime_lightning.{HOMES.get(name, 'cli.api')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
