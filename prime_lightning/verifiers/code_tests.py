"""The tests of a data row, whatever its format: asserts, a `check` function, stdin/stdout cases, function calls.

Reads: MBPP (`tests` or `test_list`), HumanEval (`test`, `entry_point`), APPS and TACO (`inputs`, `outputs`,
`fn_name`, also inside `input_output`), CodeContests (`public_tests`, `private_tests`, `generated_tests`), Codeforces
(`official_tests`, `examples`), LiveCodeBench (`public_test_cases`, `private_test_cases`), LeetCode (`inputs`,
`outputs`, `fn_name`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prime_lightning.rollout import Prompt
from prime_lightning.verifiers import code_asserts as asserts
from prime_lightning.verifiers.code_asserts import Call
from prime_lightning.verifiers.jail.judge import MODULES

_MOST_PACKED = 256 << 20  # bytes of an unpacked LiveCodeBench entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a program must do. Exactly one of `tests`, `stdio` and `functions` is not empty.

    Example:
        >>> task_of({"tests": ["assert f(1) == 2"]}).calls
        (Call(expression='f(1)', expected=2),)
    """

    tests: tuple[str, ...] = ()
    """Sources with asserts, run in order."""
    calls: tuple[Call, ...] | None = None
    """The same as plain calls; None where they need a judge."""
    stdio: tuple[tuple[str, str], ...] = ()
    """Standard input and expected standard output."""
    functions: tuple[tuple[tuple[Any, ...], Any], ...] = ()
    """Arguments and expected result of `entry_point`."""
    prelude: str = ""
    """Put before the program: imports and helpers that its prompt gave (HumanEval's `prompt`)."""
    setup: str = ""
    """Run after the program and before the tests."""
    entry_point: str = ""
    names: tuple[str, ...] = ()
    """What the tests want of the program, for `script` mode."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """What the tests want of the standard library without importing it: local name -> module."""
    in_place: bool = False
    """Whether tests look, by their form, at what a call does to its arguments."""
    reference: str = ""
    """A solution that passes; empty where there is none."""
    tolerance: float | None = None
    """Error allowed to floats; None is the options' value."""

    def whole(self, program: str) -> str:
        """A program behind its prelude."""
        return f"{self.prelude}\n{program}" if self.prelude else program

    @property
    def size(self) -> int:
        """How many tests."""
        return len(self.tests) or len(self.stdio) or len(self.functions)

    def key(self) -> str:
        """A name for the disk: equal for equal tests and reference."""
        parts = (self.tests, self.stdio, self.functions, self.setup, self.entry_point, self.reference, self.tolerance)
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def row_of(prompt: Prompt) -> Mapping[str, Any]:
    """The row with the tests; where it has none, `answer` may hold them as JSON (PRIME's Eurus-2-RL data)."""
    if prompt.answer.lstrip().startswith(("{", "[")) and not _has_tests(prompt.row):
        loaded = _json(prompt.answer)
        return {**prompt.row, **(loaded if isinstance(loaded, dict) else {"tests": loaded})}
    return prompt.row


_SOURCES = (
    "tests", "test_list", "test", "inputs", "input_output", "public_tests", "private_tests", "generated_tests",
    "official_tests", "examples", "public_test_cases", "private_test_cases",
)  # fmt: skip


def _has_tests(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) for name in _SOURCES)


def task_of(row: Mapping[str, Any]) -> Task:
    """Read the tests of a row.

    Raises:
        ValueError: There are none, or they cannot be read; the message says which.
    """
    common: dict[str, Any] = {
        "setup": "\n".join(
            filter(None, [*(row.get("test_imports") or []), row.get("setup") or row.get("test_setup_code") or ""])
        ),
        "prelude": str(row.get("prelude") or ""),
        "entry_point": str(row.get("entry_point") or row.get("fn_name") or ""),
        "reference": str(row.get("reference_solution") or row.get("reference") or ""),
        "tolerance": None if row.get("tolerance") is None else float(row["tolerance"]),
    }
    tests = _json(row.get("tests") or row.get("test_list") or ())
    if isinstance(tests, dict):
        return task_of({**row, "tests": None, "test_list": None, **tests})
    if tests and all(isinstance(test, str) for test in tests):
        return _asserts(list(tests), common)
    if row.get("test"):
        call = "" if not common["entry_point"] else f"\ncheck({common['entry_point']})\n"
        return _asserts([row["test"] + call], common)
    return _cases(row, tests, common)


def _asserts(tests: list[str], common: dict[str, Any]) -> Task:
    own, imported = asserts.defined_by(common["reference"])
    if common["entry_point"]:
        own.add(common["entry_point"])
    own = own or asserts.called_names(tests)
    setup_names = asserts.bound_by(common["setup"])
    calls = [asserts.as_call(test, own, setup_names) for test in tests]
    wanted = asserts.wanted_names([common["setup"], *tests], own)
    library = {name: name for name in wanted & MODULES} | {name: imported[name] for name in wanted & imported.keys()}
    return Task(
        tests=tuple(tests),
        calls=None if None in calls else tuple(call for call in calls if call is not None),
        names=tuple(sorted(wanted - (library.keys() - own))),
        modules={name: module for name, module in library.items() if name not in own},
        in_place=asserts.discards_results(tests, own),
        **common,
    )


def _cases(row: Mapping[str, Any], tests: Any, common: dict[str, Any]) -> Task:
    packed = _json(row.get("input_output") or {})
    pairs: list[tuple[Any, Any]] = []
    function = common["entry_point"]
    for holder in (row, packed):
        function = str(holder.get("fn_name") or function)
        pairs += zip(_json(holder.get("inputs") or ()), _json(holder.get("outputs") or ()), strict=True)
    for name in ("public_tests", "private_tests", "generated_tests"):
        holder = _json(row.get(name) or {})
        pairs += zip(holder.get("input") or (), holder.get("output") or (), strict=True)
    functional = bool(function) and bool(pairs)
    listed = [*tests]
    for name in ("official_tests", "public_test_cases", "private_test_cases"):
        listed += _unpacked(row.get(name) or ())
    for case in listed or _json(row.get("examples") or ()):
        if not isinstance(case, Mapping):
            raise ValueError(f"Expected tests to be strings or mappings, got {type(case).__name__}.")
        functional = functional or case.get("testtype") == "functional"
        pairs.append((case.get("stdin", case.get("input", "")), case.get("stdout", case.get("output"))))
    if not pairs:
        raise ValueError(f"Expected tests in one of the columns {_SOURCES}, got a row with {sorted(row)}.")
    if functional:
        metadata = _json(row.get("metadata") or {})
        name = function or str(metadata.get("func_name") or "")
        return Task(
            functions=tuple(_function_case(*pair) for pair in pairs), **{**common, "entry_point": _identifier(name)}
        )
    return Task(stdio=tuple((_lines(stdin), _lines(stdout)) for stdin, stdout in pairs), **common)


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f"Expected the name of a function for tests with inputs and outputs, got {name!r}.")
    return name


def _function_case(arguments: Any, expected: Any) -> tuple[tuple[Any, ...], Any]:
    """LiveCodeBench writes one JSON value per line; APPS and LeetCode hold a list of arguments."""
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.split("\n") if line.strip()]
        expected = _json(expected)
    if isinstance(arguments, Mapping):
        raise ValueError("Expected the arguments of a function as a list, got a mapping.")
    return tuple(arguments), expected


def _lines(text: Any) -> str:
    """APPS has some cases as lists of lines."""
    if isinstance(text, (list, tuple)):
        return "\n".join(map(str, text))
    if text is None:
        raise ValueError("Expected every case to have an output, got none.")
    return str(text)


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"Expected JSON in the tests, got {value[:60]!r}: {error}") from None


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
    return list(_json(cases))
