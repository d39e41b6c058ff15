"""The rows of a benchmark, from the hub or from a file of one's own, by the same names."""

from __future__ import annotations

from typing import Any

from prime_lightning.prompts.dataset import DatasetPrompts

NEEDED = {"math": ("problem", "answer"), "code": ("prompt",)}
TESTS = ("tests", "test")


class BenchmarkRows(DatasetPrompts):
    """Rows in the order of the file, their columns by the package's names.

    Maths needs `problem` and `answer`; code needs `prompt`, and `tests` (asserts) or `test` (HumanEval's `check`). An
    `id` names a row in files of samples. Other columns stay, and are ignored by templates that do not name them.

    Args:
        path: A jsonl, parquet or csv file (`.gz` too), or a hub id.
        split: Split of a hub data set.
        fields: Where a column of the left name is missing, it is read from the column of the right name.
        where: Only rows with these values, in files that have such columns.
        **options: Of `DatasetPrompts`.

    Raises:
        ValueError: if a needed column is missing, or an answer is empty.
    """

    def __init__(
        self,
        path: str,
        split: str = "test",
        fields: dict[str, str] | None = None,
        where: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.fields, self.where = fields or {}, where or {}
        super().__init__(path, split=split, shuffle=False, **options)

    def _check(self, path: str, *, drop: bool = False) -> None:
        for column, wanted in self.where.items():
            if column in self.rows.column_names:
                chosen = [i for i, value in enumerate(self.rows[column]) if value == wanted]
                self.rows = self.rows.select(chosen)
        for field, column in self.fields.items():
            if field not in self.rows.column_names and column in self.rows.column_names:
                self.rows = self.rows.add_column(field, self.rows[column])
        columns = self.rows.column_names
        missing = [field for field in NEEDED.get(self.kind, ()) if field not in columns]
        if self.kind == "code" and not any(field in columns for field in TESTS):
            missing.append(" or ".join(TESTS))
        if missing:
            other = {field: self.fields[field] for field in missing if field in self.fields}
            raise ValueError(
                f"Expected the columns {missing} in {path!r}"
                f"{f' (or, on the hub, {other})' if other else ''}, got {sorted(columns)}."
            )
        super()._check(path, drop=drop)

    def hidden(self) -> tuple[str, ...]:
        """The answer, by its name on the hub too."""
        return (*super().hidden(), *([self.fields["answer"]] if "answer" in self.fields else []))
