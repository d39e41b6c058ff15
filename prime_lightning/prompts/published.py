"""Data sets of known form: the training data of PRIME's authors, and rows of a benchmark.

`PRIME-RL/Eurus-2-RL-Data` has 457,000 maths and 27,000 code prompts. Its rows carry chat messages, and a reference
answer (maths) or stdin/stdout tests as JSON (code) under `reward_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prime_lightning.prompts.dataset import DatasetPrompts, Template
from prime_lightning.prompts.template import at
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
        super().__init__(
            path, revision=revision, template=template, source=source, columns={"answer": TRUTH}, **options
        )

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


NEEDED = {"math": ("problem", "answer"), "code": ("prompt",)}
ASSERTS = ("tests", "test")


class BenchmarkRows(DatasetPrompts):
    """Rows in the order of the file, their columns by the package's names.

    Maths needs `problem` and `answer`; code needs `prompt`, and `tests` (asserts) or `test` (HumanEval's `check`). An
    `id` names a row in files of samples. Other columns stay, and are ignored by templates that do not name them.

    Args:
        path: A jsonl, parquet or csv file (`.gz` too), or a hub id.
        split: Split of a hub data set.
        columns: As there, but only where a column of our name is missing: files may have them under either name.
        where: Only rows with these values, in files that have such columns.
        **options: Of `DatasetPrompts`.

    Raises:
        ValueError: if a needed column is missing, or an answer is empty.
    """

    def __init__(
        self,
        path: str,
        split: str = "test",
        columns: dict[str, str] | None = None,
        where: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.theirs, self.where = columns or {}, where or {}
        super().__init__(path, split=split, shuffle=False, **options)

    def _check(self, path: str, *, drop: bool = False) -> None:
        for column, wanted in self.where.items():
            if column in self.rows.column_names:
                chosen = [i for i, value in enumerate(self.rows[column]) if value == wanted]
                self.rows = self.rows.select(chosen)
        for ours, theirs in self.theirs.items():
            if ours not in self.rows.column_names and theirs in self.rows.column_names:
                self.rows = self.rows.add_column(ours, self.rows[theirs])
        columns = self.rows.column_names
        missing = [name for name in NEEDED.get(self.kind, ()) if name not in columns]
        if self.kind == "code" and not any(name in columns for name in ASSERTS):
            missing.append(" or ".join(ASSERTS))
        if missing:
            other = {name: self.theirs[name] for name in missing if name in self.theirs}
            raise ValueError(
                f"Expected the columns {missing} in {path!r}"
                f"{f' (or, on the hub, {other})' if other else ''}, got {sorted(columns)}."
            )
        super()._check(path, drop=drop)

    def hidden(self) -> tuple[str, ...]:
        """The answer, by its name on the hub too."""
        return (*super().hidden(), *([self.theirs["answer"]] if "answer" in self.theirs else []))
