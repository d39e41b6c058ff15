"""PRIME (Process Reinforcement through IMplicit rEwards, arXiv 2502.01456) as a PyTorch Lightning package.

import prime_lightning

run = prime_lightning.train("Qwen/Qwen2.5-0.5B-Instruct", rows, max_steps=20)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = ["ImplicitPRM", "PrimeModule", "RolloutDataModule", "Run", "evaluate", "rerank", "score", "train"]
HOMES = {"ImplicitPRM": "prm.implicit", "PrimeModule": "training.module", "RolloutDataModule": "sampling.datamodule"}
HOMES |= dict.fromkeys(("Run", "evaluate", "rerank", "score", "train"), "cli.api")
"""Files of what users import."""


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562): each name is imported from its file when it is first asked for.

    Args:
        package: Name of the package.
        homes: Names, and the modules below the package that they stand in.

    Returns:
        A function that raises AttributeError for any other name.

    Example:
        >>> lazily("prime_lightning", {"Prompt": "rollout"})("Prompt").__name__
        'Prompt'
    """

    def found(name: str) -> Any:
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return found


__getattr__ = lazily(__name__, HOMES)
