"""From the columns of a data row to its tests: one reader for each family of public data sets.

A family is known by a column that only it has; the first of `FAMILIES` whose column is filled reads the row, and a row
of none is an error. A reader says which cases there are; whether a case is a call or a program's standard input is said
by the case, else by the row: where a function is named, it is called.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_MOST_PACKED = 256 << 20  # bytes of an unpacked LiveCodeBench entry
_PRINTED = ("stdin_stdout", "stdin", "stdio", "standard_input")
_CALLED = ("function_call", "functional", "call_based", "function")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    r"""What goes in and what must come out.

    Example:
        >>> Case("1\n", "2\n").function
        ''
    """

    given: Any
    """Standard input, or the arguments of a call."""
    expected: Any
    function: str = ""
    """The function that is called; empty for a program that reads and prints, or where the row says it."""
    kind: str = ""
    """`call` or `stdio`; empty where the case does not say."""


def read(row: Row) -> list[str] | list[Case]:
    """The tests of a row: sources with asserts, or cases.

    Raises:
        ValueError: There are none, or they cannot be read; the message says what was expected.
    """
    for column, reader in FAMILIES:
        if _filled(row.get(column)):
            found = reader(row)
            if found:
                return found
    names = ", ".join(f"`{column}`" for column, _ in FAMILIES)
    raise ValueError(f"Expected tests in one of the columns {names}, got a row with {sorted(row)}.")


def has_tests(row: Row) -> bool:
    """Whether a column that holds tests is filled."""
    return any(_filled(row.get(column)) for column, _ in FAMILIES)


def _filled(value: Any) -> bool:
    return value is not None and value != "" and (not hasattr(value, "__len__") or len(value) > 0)


def structure(value: Any) -> Any:
    """What a column holds: the value itself, or what its text is in JSON or (some sets) as a literal of Python.

    Raises:
        ValueError: The text is neither.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"Expected JSON in the tests, got {value[:60]!r}: {error}") from None


def _tests(row: Row) -> list[str] | list[Case]:
    """Ours, MBPP's, DeepCoder's: a list of asserts or of cases, or a mapping with the columns of another family."""
    column = "tests" if _filled(row.get("tests")) else "test_list"
    tests = structure(row[column])
    if isinstance(tests, Mapping):
        return read({**row, "tests": None, "test_list": None, **tests})
    tests = list(tests)
    texts = [isinstance(test, str) for test in tests]
    if all(texts):
        return tests
    if any(texts):
        raise ValueError("Expected tests of one form, got strings and mappings.")
    return _listed(tests)


def _source(row: Row) -> list[str]:
    """HumanEval's `check`, KodCode's and others' functions for pytest, or plain asserts, in one text or several."""
    test = row.get("test") or row["test_code"]
    return [test] if isinstance(test, str) else [str(part) for part in test]


def _listed(cases: Iterable[Any]) -> list[Case]:
    """Cases one by one, as mappings."""
    return [_case(case) for case in cases]


def _case(case: Any) -> Case:
    if not isinstance(case, Mapping):
        raise ValueError(f"Expected tests to be strings or mappings, got {type(case).__name__}.")
    said = str(case.get("type") or case.get("testtype") or "").lower()
    if said and said not in _PRINTED + _CALLED:
        raise ValueError(f"Expected the type of a case to be one of {_PRINTED + _CALLED}, got {said!r}.")
    kind = "stdio" if said in _PRINTED or "stdin" in case or "stdout" in case else "call" if said else ""
    given = case.get("stdin", case.get("input", ""))
    return Case(given, case.get("stdout", case.get("output")), "" if kind == "stdio" else function_of(case), kind)


def function_of(holder: Row) -> str:
    """The function that a row or a case names."""
    metadata = structure(holder.get("metadata") or {})
    inner = metadata.get("func_name") if isinstance(metadata, Mapping) else ""
    names = ("fn_name", "func_name", "function_name", "entry_point")
    return str(next((holder[name] for name in names if holder.get(name)), inner) or "")


def _paired(holder: Row, inputs: str, outputs: str, function: str = "") -> list[Case]:
    given, expected = (structure(holder.get(name) or ()) for name in (inputs, outputs))
    if len(given) != len(expected):
        raise ValueError(
            f"Expected as many `{outputs}` as `{inputs}`: one is shorter, {len(given)} and {len(expected)}."
        )
    return [Case(*pair, function) for pair in zip(given, expected, strict=True)]


def _apps(row: Row) -> list[Case]:
    """APPS, TACO, Eurus-2: two lists, in the row or in `input_output`; `fn_name` makes them calls."""
    packed = structure(row.get("input_output") or {})
    if not isinstance(packed, Mapping):
        return _listed(packed)
    return [
        *_paired(row, "inputs", "outputs", function_of(row)),
        *_paired(packed, "inputs", "outputs", function_of(packed) or function_of(row)),
    ]


def _contests(row: Row) -> list[Case]:
    """CodeContests: two lists in each of three columns."""
    found: list[Case] = []
    for name in ("public_tests", "private_tests", "generated_tests"):
        found += _paired(structure(row.get(name) or {}), "input", "output")
    return found


def _codeforces(row: Row) -> list[Case]:
    return _listed(structure(row.get("official_tests") or row.get("examples") or ()))


def _live(row: Row) -> list[Case]:
    """LiveCodeBench: shown and hidden cases; the hidden ones may be packed."""
    return _listed([*_unpacked(row.get("public_test_cases")), *_unpacked(row.get("private_test_cases"))])


def _synthetic(row: Row) -> list[Case]:
    """SYNTHETIC-1: a mapping with a language and cases."""
    info = structure(row["verification_info"])
    if not isinstance(info, Mapping) or not _filled(info.get("test_cases")):
        raise ValueError("Expected `test_cases` in `verification_info`.")
    language = str(info.get("language") or "python").lower()
    if not language.startswith("python"):
        raise ValueError(f"Expected tests of Python programs, got the language {language!r}.")
    return _listed(structure(info["test_cases"]))


FAMILIES: tuple[tuple[str, Callable[[Row], list[str] | list[Case]]], ...] = (
    ("tests", _tests),
    ("test_list", _tests),
    ("test", _source),
    ("test_code", _source),
    ("inputs", _apps),
    ("input_output", _apps),
    ("verification_info", _synthetic),
    ("public_tests", _contests),
    ("private_tests", _contests),
    ("generated_tests", _contests),
    ("public_test_cases", _live),
    ("private_test_cases", _live),
    ("official_tests", _codeforces),
    ("examples", _codeforces),
)
"""A column that only one family has, and that family's reader; the first that is filled is taken."""


class _TextOnly(pickle.Unpickler):
    """Unpickles strings and refuses everything that has a class."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise ValueError(f"Expected plain text in packed tests, got {module_name}.{global_name}.")


def _unpacked(cases: Any) -> list[Any]:
    """LiveCodeBench packs hidden cases as base64 of zlib of a pickled JSON string."""
    if isinstance(cases, str) and not cases.lstrip().startswith(("[", "{")):
        try:
            raw = zlib.decompressobj().decompress(base64.b64decode(cases), _MOST_PACKED)
            cases = _TextOnly(io.BytesIO(raw)).load()
        except (zlib.error, pickle.UnpicklingError, EOFError, TypeError) as error:
            raise ValueError(f"Expected packed tests, got something else: {error}") from None
    return list(structure(cases) or ())
