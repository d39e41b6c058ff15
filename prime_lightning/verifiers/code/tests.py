"""What a program must do, from the tests of a data row, whatever their format.

`code/rows.py` reads the columns, `code/units.py` finds functions and classes for pytest and unittest, `code/asserts.py`
what asserts need. Training and `prime-lightning verify` both come in by `row_of` and `task_of`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prime_lightning.rollout import Prompt
from prime_lightning.verifiers.code import asserts
from prime_lightning.verifiers.code.asserts import Call
from prime_lightning.verifiers.code.rows import Case, Row, function_of, has_tests, read, structure
from prime_lightning.verifiers.code.units import PROGRAM_MODULES, units_of
from prime_lightning.verifiers.jail.judge import MODULES


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
    aliases: tuple[str, ...] = ()
    """Modules by whose names the tests import the program."""
    needs: tuple[str, ...] = ()
    """Third-party modules that the tests import."""
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


def row_of(prompt: Prompt) -> Row:
    """The row with the tests; where it has none, `answer` or a ground truth may hold them (PRIME's Eurus-2-RL data)."""
    row = prompt.row
    if has_tests(row):
        return row
    model = row.get("reward_model")
    truths = (
        prompt.answer,
        row.get("answer"),
        row.get("ground_truth"),
        isinstance(model, Mapping) and model.get("ground_truth"),
    )
    for truth in truths:
        if isinstance(truth, str) and not truth.lstrip().startswith(("{", "[")):
            continue
        if truth:
            held = structure(truth)
            return {**row, **held} if isinstance(held, Mapping) else {**row, "tests": held}
    return row


def task_of(row: Row) -> Task:
    """Read the tests of a row.

    Raises:
        ValueError: There are none, or they cannot be read or run here; the message says which.
    """
    imports = row.get("test_imports") or []
    common: dict[str, Any] = {
        "setup": "\n".join(filter(None, [*imports, row.get("setup") or row.get("test_setup_code") or ""])),
        "prelude": str(row.get("prelude") or ""),
        "entry_point": str(row.get("entry_point") or row.get("fn_name") or ""),
        "reference": str(row.get("reference_solution") or row.get("reference") or ""),
        "tolerance": None if row.get("tolerance") is None else float(row["tolerance"]),
    }
    tests = read(row)
    if isinstance(tests[0], Case):
        return _cases([case for case in tests if isinstance(case, Case)], row, common)
    return _sources([str(test) for test in tests], row, common)


def _sources(sources: list[str], row: Row, common: dict[str, Any]) -> Task:
    """Tests that are Python: `check(candidate)`, functions and classes, or asserts."""
    tests: list[str] = []
    for source in sources:
        units = units_of(source)
        if units is not None:
            common["setup"] = f"{common['setup']}\n{units.setup}".strip()
            common["reference"] = common["reference"] or _solution(row)
            tests += units.tests
        elif asserts.only_imports(source):
            common["setup"] = f"{common['setup']}\n{source}".strip()
        else:
            tests.append(_checked(source, common["entry_point"]))
    imported = asserts.imports_of([common["setup"], *tests])
    common["aliases"] = tuple(sorted(imported.keys() & PROGRAM_MODULES))
    common["needs"] = tuple(sorted(imported.keys() - PROGRAM_MODULES - sys.stdlib_module_names - {"pytest"}))
    program = {name for alias in common["aliases"] for name in imported[alias]}
    common["entry_point"] = common["entry_point"] or min(program, default="")
    asserts.refuse_tests_of_nothing(common["setup"], tests)
    return _asserts(tests, program, common)


def _checked(source: str, entry_point: str) -> str:
    """HumanEval's tests define `check`, which somebody must call."""
    if not asserts.defines(source, "check"):
        return source
    if asserts.calls_at_top(source, "check"):
        return source
    if not entry_point:
        raise ValueError("Expected `entry_point`, the name of the function that `check` is called with.")
    return f"{source}\ncheck({entry_point})\n"


def _solution(row: Row) -> str:
    """KodCode's solution, if it is a program."""
    text = str(row.get("solution") or "")
    return text if asserts.defined_by(text)[0] else ""


def _asserts(tests: list[str], program: set[str], common: dict[str, Any]) -> Task:
    own, imported = asserts.defined_by(common["reference"])
    own |= program | ({common["entry_point"]} if common["entry_point"] else set())
    own = own or asserts.called_names(tests)
    setup_names = asserts.bound_by(common["setup"])
    calls = [asserts.as_call(test, own, setup_names) for test in tests]
    wanted = asserts.wanted_names([common["setup"], *tests], own) | program
    library = {name: name for name in wanted & MODULES} | {name: imported[name] for name in wanted & imported.keys()}
    return Task(
        tests=tuple(tests),
        calls=None if None in calls or common["aliases"] else tuple(call for call in calls if call is not None),
        names=tuple(sorted(wanted - (library.keys() - own) - {"__run__", "__name__"})),
        modules={name: module for name, module in library.items() if name not in own},
        in_place=asserts.discards_results(tests, own),
        **common,
    )


def _cases(cases: list[Case], row: Row, common: dict[str, Any]) -> Task:
    """Calls where a function is named, by the cases or the row; else programs that read and print."""
    named = function_of(row)
    calls = [case.kind == "call" or (not case.kind and bool(case.function or named)) for case in cases]
    if not any(calls):
        return Task(stdio=tuple((_lines(case.given), _lines(case.expected)) for case in cases), **common)
    if not all(calls):
        raise ValueError("Expected cases of one kind, got calls of a function and runs of a program.")
    functions = {case.function for case in cases} - {""} or {named}
    if len(functions) > 1:
        raise ValueError(f"Expected one function for all cases, got {sorted(functions)}.")
    entry_point = _identifier(functions.pop().rpartition(".")[2])  # `Solution().f` is looked for in the program
    return Task(
        functions=tuple(_function_case(case.given, case.expected) for case in cases),
        **{**common, "entry_point": entry_point},
    )


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise ValueError(f"Expected the name of a function for tests with inputs and outputs, got {name!r}.")
    return name


def _function_case(arguments: Any, expected: Any) -> tuple[tuple[Any, ...], Any]:
    """LiveCodeBench writes one JSON value per line; APPS and LeetCode hold a list of arguments."""
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.split("\n") if line.strip()]
        expected = structure(expected)
    if not isinstance(arguments, (list, tuple)):
        raise ValueError(f"Expected the arguments of a function as a list, got {type(arguments).__name__}.")
    return tuple(arguments), expected


def _lines(text: Any) -> str:
    """APPS has some cases as lists of lines."""
    if isinstance(text, (list, tuple)):
        return "\n".join(map(str, text))
    if text is None:
        raise ValueError("Expected every case to have an output, got none.")
    return str(text)
