"""Reads, appends and replaces files of rows (jsonl), and replaces other files, so that none is ever found half written.

What a crash leaves is at most a torn last line, which readers pass over and the next append takes away.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]


def read_rows(path: str | Path, *, parse_float: Callable[[str], Any] | None = None) -> Iterator[tuple[str, Row]]:
    """Each row of a jsonl file, and where it stands: `line 3 of 'rows.jsonl'`.

    Args:
        path: Of the file.
        parse_float: Makes numbers with a point of their text; `str` keeps all digits.

    Raises:
        ValueError: if there is no such file, or a line is no JSON object.
    """
    path = str(path)
    if not Path(path).is_file():
        raise ValueError(f"Expected a jsonl file, got {path!r}, which does not exist.")
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"line {number} of {path!r}"
                yield where, _object(line, where, parse_float)


def _object(line: str, where: str, parse_float: Callable[[str], Any] | None = None) -> Row:
    try:
        row = json.loads(line, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected a JSON object in {where}, got {line[:60].strip()!r}: {error}.") from None
    if not isinstance(row, dict):
        raise ValueError(f"Expected a JSON object in {where}, got a {type(row).__name__}.")
    return row


def parse_row(line: str | bytes) -> Row | None:
    """The object in a line; None if it has none, as one that a crash cut off.

    Example:
        >>> parse_row('{"draw": 2}'), parse_row('{"draw": 2, "comp'), parse_row("[2]")
        ({'draw': 2}, None, None)
    """
    text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
    try:
        return _object(text, "")
    except ValueError:
        return None


def whole_rows(path: Path) -> Iterator[Row]:
    """Each row of a jsonl file that a run writes, without lines that are none; no rows where there is no file."""
    if path.is_file():
        with path.open("rb") as lines:
            yield from (row for row in map(parse_row, lines) if row is not None)


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a jsonl file, which need not exist, in place of a line that a crash cut off."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _mend(file)
        file.write("".join(f"{dumps(row)}\n" for row in rows).encode())


def _mend(file: BinaryIO) -> None:
    """End the last line, or take it away if it is no row."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read() in (b"", b"\n"):
        return
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if parse_row(last) is None:
        file.truncate(size - len(last))
    else:
        file.write(b"\n")


def replace_rows(path: str | Path, rows: Iterable[Mapping[str, Any]], **options: Any) -> None:
    """Write a jsonl file, which appears whole; options are those of `json.dumps`."""
    replace_file(path, lambda file: file.writelines(f"{dumps(row, **options)}\n".encode() for row in rows))


def replace_text(path: str | Path, text: str) -> None:
    """Write a text file, which appears whole."""
    replace_file(path, lambda file: file.write(text.encode()))


def replace_file(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside its place, sync, and put it there; until then, and if that fails, the old one stays.

    Args:
        path: Of the file; its folder is made.
        write: Writes the content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # it is there only if something went wrong


def dumps(value: Any, **options: Any) -> str:
    """JSON by the standard: NaN and infinity are null.

    Example:
        >>> dumps({"mean": float("nan"), "of": (1.5, 2)})
        '{"mean": null, "of": [1.5, 2]}'
    """
    return json.dumps(_finite(value), **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
