"""The training data of PRIME's authors, `PRIME-RL/Eurus-2-RL-Data`: 457,000 maths and 27,000 code prompts.

Its rows carry chat messages, and a reference answer (maths) or stdin/stdout tests as JSON (code) under `reward_model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prime_lightning.prompts import DatasetPrompts, Template

REVISION = "9776b13264b5aaa0b16495fcf086a0a8d86fd655"


@dataclass(frozen=True, kw_only=True)
class RowMessages(Template):
    """The messages that stand in the row, system message and all."""

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The row's own messages."""
        return [{"role": message["role"], "content": message["content"]} for message in row["prompt"]]


class EurusPrompts(DatasetPrompts):
    """Rows of Eurus-2-RL-Data, graded by their `ability`: `math` or `code`.

    Args:
        path: The hub id, or a local parquet or jsonl file of the same schema.
        split: `train` or `validation`.
        revision: Commit of the hub data set.
        seed: Of the order.
        limit: Only the first rows; None takes all.
    """

    def __init__(
        self,
        path: str = "PRIME-RL/Eurus-2-RL-Data",
        split: str = "train",
        revision: str | None = REVISION,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(
            path,
            template=RowMessages(),
            split=split,
            revision=revision,
            answer_field="reward_model",
            source="eurus",
            seed=seed,
            limit=limit,
        )

    def flat(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with its answer or its tests on the top level."""
        truth = row["reward_model"]["ground_truth"]
        labelled = {"reward_model": truth} if row["ability"] == "math" else {"reward_model": "", **json.loads(truth)}
        return {**row, **labelled}

    def kind_of(self, row: Mapping[str, Any]) -> str:
        """`math` or `code`."""
        return str(row["ability"])
