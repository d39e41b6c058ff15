"""The training data of PRIME's authors, `PRIME-RL/Eurus-2-RL-Data`: 457,000 maths and 27,000 code prompts.

Its rows carry chat messages, and a reference answer (maths) or stdin/stdout tests as JSON (code) under `reward_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prime_lightning.prompts.dataset import DatasetPrompts, Template
from prime_lightning.prompts.rows import at
from prime_lightning.verifiers.references import structure

REVISION = "9776b13264b5aaa0b16495fcf086a0a8d86fd655"
TRUTH = "reward_model.ground_truth"
TESTS = frozenset({"inputs", "outputs", "fn_name", "functions", "tests", "test"})
"""Names of which a ground truth has one if it is a mapping of tests."""


class EurusPrompts(DatasetPrompts):
    """Rows of Eurus-2-RL-Data, or of another set for verl: `prompt` (messages) and `reward_model.ground_truth`.

    A row whose `ability` says code, or whose truth is a mapping of tests, is graded as code; all others as mathematics.

    Args:
        path: The hub id, or a local parquet or jsonl file of the same schema.
        revision: Commit of the hub data set.
        template: How a row becomes text; by default its own messages.
        source: Name for counts.
        **options: Of `DatasetPrompts`: `split` (`train` or `validation`), `seed`, `limit`, `drop_unanswered`.
    """

    def __init__(
        self,
        path: str = "PRIME-RL/Eurus-2-RL-Data",
        revision: str | None = REVISION,
        template: Template | None = None,
        source: str = "eurus",
        **options: Any,
    ) -> None:
        template = template or Template(user="{prompt}")
        super().__init__(path, revision=revision, template=template, source=source, answer_field=TRUTH, **options)

    def flat(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row, with its tests on the top level if it is one of code."""
        tests = structure(at(row, TRUTH)) if self.kind_of(row) == "code" else {}
        return {**row, **tests} if isinstance(tests, Mapping) else row

    def kind_of(self, row: Mapping[str, Any]) -> str:
        """`math` or `code`."""
        truth = structure(at(row, TRUTH))
        tests = isinstance(truth, Mapping) and not TESTS.isdisjoint(truth)
        return "code" if tests or "cod" in str(row.get("ability") or "").lower() else "math"

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """The truth of mathematics; nothing for code, whose tests are in the row."""
        return "" if self.kind_of(row) == "code" else super().answer_of(row)

    def _answer_columns(self) -> list[str]:
        return [name for name in self.rows.column_names if name.split(".")[0] in ("reward_model", "ability")]
