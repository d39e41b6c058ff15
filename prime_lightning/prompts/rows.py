"""Files and hub data sets -> rows.

Hugging Face `datasets` reads jsonl, json, parquet and csv files (gzip too) and hub ids. Numbers that it would round (it
holds them in 64 bits) are read once more from JSON and csv files, as text.
"""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_lightning.prompts.template import at, has, is_conversation
from prime_lightning.rollout.files import Row, read_rows

if TYPE_CHECKING:
    import datasets

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_NULLS = frozenset({"", "NULL", "null", "None", "NaN", "nan", "NA", "N/A", "n/a", "<NA>", "#N/A"})


def check_filled(rows: datasets.Dataset, field: str, path: str, *, option: str, blank: bool = False) -> None:
    """Refuse rows that lack a field.

    Args:
        rows: The rows.
        field: Its name, or a path.
        path: Of the file, for the message.
        option: What to change, for the message.
        blank: Whether empty text is allowed.

    Raises:
        ValueError: if no row has it, or it is empty in some.
    """
    missing = missing_rows(rows, field, blank=blank)
    if missing is None:
        raise ValueError(f"Expected the field {field!r} in {path!r}, got {sorted(rows.column_names)}. Set `{option}`.")
    if missing:
        raise ValueError(
            f"Expected `{field}` in every row of {path!r}, got none in {len(missing)} of {len(rows)} "
            f"(rows {missing[:5]} ..., counted from 0). Drop or fill these rows."
        )


def missing_rows(rows: datasets.Dataset, field: str, *, blank: bool = False) -> list[int] | None:
    """Rows whose field is null, nothing or (unless `blank`) empty; None if the field is in no row."""
    column = field if field in rows.column_names else field.split(".")[0].split("[")[0]
    if column not in rows.column_names:
        return None
    values = list(rows[column]) if column == field else [_found({column: value}, field) for value in rows[column]]
    missing = [i for i, value in enumerate(values) if value is None or not (blank or _fills(value))]
    absent = column != field and len(missing) == len(rows) and not any(has(value, field) for value in rows)
    return None if absent else missing


def _found(row: Mapping[str, Any], path: str) -> Any:
    try:
        return at(row, path)
    except KeyError:
        return None


def _fills(value: Any) -> bool:
    return bool(value) if isinstance(value, list | dict) else bool(str(value).strip())


def load_rows(
    path: str | Sequence[str], *, split: str, name: str | None, revision: str | None, exact: str | None = None
) -> datasets.Dataset:
    """Read files (by their ending) or a hub data set.

    Args:
        path: A file, several, or a hub id.
        split: Split of a hub data set.
        name: Configuration of a hub data set.
        revision: Commit of a hub data set.
        exact: A field, or the path of one, whose numbers keep all their digits, as text.

    Raises:
        ValueError: if a file is missing, or neither a file nor a data set that can be loaded.
    """
    import datasets  # here, because it brings pandas, which takes longer than all that `plan` computes

    files = [path] if isinstance(path, str) else list(path)
    loader = LOADERS.get(Path(files[0].removesuffix(".gz")).suffix)
    if loader is None:
        return _from_hub(files[0], split, name, revision)
    missing = [file for file in files if "://" not in file and not Path(file).is_file()]
    if missing:
        raise ValueError(f"Expected a data file, got {missing[0]!r}, which does not exist.")
    converters = {exact: _unless_null} if exact is not None and loader == "csv" else None
    options = {"converters": converters} if converters else {}
    try:
        table = datasets.load_dataset(loader, data_files=files, split="train", **options)
    except (StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        table = _read_plainly(files) if loader == "json" else None
        if table is None:
            raise ValueError(
                f"Expected rows in {files}, got a file that is empty or cannot be read: {error.__cause__ or 'no rows'}."
            ) from error
    if loader != "json" or any("://" in file for file in files):
        return table
    return _with_digits(_as_rows(table, files), files, exact)


def located_rows(path: str, *, split: str = "train") -> list[tuple[str, Row]]:
    """The rows of a file or hub data set, each with where it stands: a jsonl file's by the numbers of their lines.

    Raises:
        ValueError: as `load_rows` and `read_rows`, or for no rows.
    """
    if path.endswith(".jsonl") and "://" not in path:
        rows = list(read_rows(path))
        if not rows:
            raise ValueError(f"Expected rows in {path!r}, got an empty file.")
        return rows
    table = load_rows(path, split=split, name=None, revision=None)
    return [(f"row {i} of {path!r}, counted from 0", dict(row)) for i, row in enumerate(table)]


def stream_rows(path: str | Sequence[str], *, split: str, name: str | None, revision: str | None) -> Any:
    """The same files or hub data set, read row by row as they are asked for: a `datasets.IterableDataset`.

    Args:
        path: A file, several (URLs too), or a hub id.
        split: Split of a hub data set.
        name: Configuration of a hub data set.
        revision: Commit of a hub data set.

    Raises:
        ValueError: if a file is missing, or neither a file nor a data set that can be opened.
    """
    import datasets

    files = [path] if isinstance(path, str) else list(path)
    loader = LOADERS.get(Path(files[0].removesuffix(".gz")).suffix)
    missing = [file for file in files if loader and "://" not in file and not Path(file).is_file()]
    if missing:
        raise ValueError(f"Expected a data file, got {missing[0]!r}, which does not exist.")
    if loader is None:
        with _hub_errors(files[0]):
            return datasets.load_dataset(files[0], name, split=split, revision=revision, streaming=True)
    return datasets.load_dataset(loader, data_files=files, split="train", streaming=True)


def _unless_null(text: str) -> str | None:
    return None if text.strip() in _NULLS else text


def _from_hub(name: str, split: str, configuration: str | None, revision: str | None) -> datasets.Dataset:
    import datasets

    with _hub_errors(name):
        return datasets.load_dataset(name, configuration, split=split, revision=revision)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What the hub says, as what to do."""
    import datasets

    try:
        yield
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"Expected a {'/'.join(LOADERS)} file or a data set of the hub, got {name!r}: {error}. Where "
            "the hub cannot be reached, give a file."
        ) from error


# ---- JSON ------------------------------------------------------------------------------------------------------------


def json_rows(files: Sequence[str], *, digits: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of JSON files by Python's own reader, with numbers as their text; a list is a row with numbered fields.

    Raises:
        ValueError: if a file is no JSON.
    """
    options: dict[str, Any] = {"parse_float": str, "parse_int": str} if digits else {}
    for file in files:
        with (
            gzip.open(file, "rt", encoding="utf-8-sig")
            if file.endswith(".gz")
            else open(file, encoding="utf-8-sig") as lines
        ):
            text = lines.read()
        try:
            found = [json.loads(line, **options) for line in text.splitlines() if line.strip()]
        except ValueError:
            found = [json.loads(text, **options)]
        for row in found[0] if len(found) == 1 and isinstance(found[0], list) else found:
            yield row if isinstance(row, dict) else {str(i): value for i, value in enumerate(row)}


def _read_plainly(files: Sequence[str]) -> datasets.Dataset | None:
    """Rows that `datasets` cannot read, such as those with a number beyond all floats; None if Python cannot."""
    import datasets

    try:
        rows = list(json_rows(files))
        return datasets.Dataset.from_list(rows) if rows else None
    except (ValueError, TypeError, OSError):
        return None


def _as_rows(table: datasets.Dataset, files: Sequence[str]) -> datasets.Dataset:
    """A JSON file that is one mapping, of columns or of a list of rows, as the rows that it means."""
    rows = _spread(dict(table[0])) if len(table) == 1 and len(files) == 1 else None
    if rows is None:
        return table
    warnings.warn(f"{files[0]!r} is one mapping; its lists are read as the columns of {len(rows)} rows.", stacklevel=2)
    return type(table).from_list(rows)


def _spread(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a mapping of columns (`{"a": [1, 2]}` or `{"a": {"0": 1}}`) or of `{"data": [row, ...]}`.

    Example:
        >>> _spread({"a": [1, 2], "b": [3, 4]}), _spread({"data": [{"a": 1}]}), _spread({"a": 1})
        ([{'a': 1, 'b': 3}, {'a': 2, 'b': 4}], [{'a': 1}], None)
    """
    columns = [list(value.values()) if isinstance(value, dict) else value for value in row.values()]
    if not columns or not all(isinstance(column, list) and column for column in columns):
        return None
    if is_conversation(columns[0]) or len({len(column) for column in columns}) > 1:
        return None
    if len(columns) == 1 and isinstance(columns[0][0], dict):
        return columns[0]
    numbered = all(not isinstance(v, dict) or all(key.isdigit() for key in v) for v in row.values())
    return [dict(zip(row, values, strict=True)) for values in zip(*columns, strict=True)] if numbered else None


def _with_digits(table: datasets.Dataset, files: Sequence[str], field: str | None) -> datasets.Dataset:
    """The table with a field as it stands in the files, where `datasets` holds it as something that rounds."""
    root = None if field is None else field if field in table.column_names else field.split(".")[0].split("[")[0]
    if field is None or root not in table.column_names or _lossless(table.features[root]):
        return table
    rows = list(json_rows(files))
    rows = (_spread(rows[0]) or rows) if len(rows) == 1 else rows
    values = [_as_written(_found(row, field)) for row in rows]
    if field in table.column_names:
        table = table.remove_columns(field)
    return table.add_column(field, values) if table.column_names else type(table).from_dict({field: values})


def _as_written(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _lossless(feature: Any) -> bool:
    """Whether values of this type are as they were written: text, or whole numbers of 64 bits."""
    if isinstance(feature, dict):
        return all(map(_lossless, feature.values()))
    inside = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inside is not None:
        return _lossless(inside)
    kind = getattr(feature, "dtype", "")
    return kind in ("string", "large_string", "bool", "null") or kind.startswith(("int", "uint"))
