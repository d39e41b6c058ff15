"""Prompts: rows of data sets, made-up arithmetic, chat templates, and what makes them hard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prime_lightning import lazily

if TYPE_CHECKING:
    from prime_lightning.prompts.arithmetic import ArithmeticLessons, ArithmeticPrompts
    from prime_lightning.prompts.dataset import DatasetPrompts, MixedPrompts, Prompts
    from prime_lightning.prompts.difficulty import ByDifficulty
    from prime_lightning.prompts.published import BenchmarkRows, EurusPrompts
    from prime_lightning.prompts.streaming import StreamedPrompts

__all__ = [
    "ArithmeticLessons",
    "ArithmeticPrompts",
    "BenchmarkRows",
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
    "BenchmarkRows": "published",
    "DatasetPrompts": "dataset",
    "MixedPrompts": "dataset",
    "Prompts": "dataset",
    "ByDifficulty": "difficulty",
    "EurusPrompts": "published",
    "StreamedPrompts": "streaming",
}
"""Files of the names that users write; each is imported when it is first asked for."""

__getattr__ = lazily(__name__, HOMES)
