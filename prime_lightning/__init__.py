"""PRIME (Process Reinforcement through IMplicit rEwards, arXiv 2502.01456) as a PyTorch Lightning package.

import prime_lightning

run = prime_lightning.train("Qwen/Qwen2.5-0.5B-Instruct", rows, max_steps=20)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = ["Run", "evaluate", "rerank", "score", "train"]


def __getattr__(name: str) -> Any:
    """The functions of `prime_lightning.api`, imported when they are first asked for."""
    if name in __all__:
        return getattr(import_module("prime_lightning.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
