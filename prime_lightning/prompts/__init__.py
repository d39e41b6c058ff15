"""Prompts: rows of data sets, made-up arithmetic, chat templates, and what makes them hard."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prime_lightning.prompts.arithmetic import ArithmeticLessons, ArithmeticPrompts
    from prime_lightning.prompts.dataset import DatasetPrompts, MixedPrompts, Prompts
    from prime_lightning.prompts.difficulty import ByDifficulty
    from prime_lightning.prompts.eurus import EurusPrompts
    from prime_lightning.prompts.streaming import StreamedPrompts

__all__ = [
    "ArithmeticLessons",
    "ArithmeticPrompts",
    "ByDifficulty",
    "DatasetPrompts",
    "EurusPrompts",
    "MixedPrompts",
    "Prompts",
    "StreamedPrompts",
]
HOMES = {
    "ArithmeticLessons": "arithmetic",
    "ArithmeticPrompts": "arithmetic",
    "DatasetPrompts": "dataset",
    "MixedPrompts": "dataset",
    "Prompts": "dataset",
    "ByDifficulty": "difficulty",
    "EurusPrompts": "eurus",
    "StreamedPrompts": "streaming",
}
"""Files of the names that users write; each is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
