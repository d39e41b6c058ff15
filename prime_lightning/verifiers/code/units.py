"""Tests as functions and classes, as pytest and unittest run them: found in a trusted source, for the judge to run.

The source becomes set-up, and each function or method one test. What needs a real pytest, or looks at what a program
prints, is no test that can be run here: the task is unusable, and says so.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from prime_lightning.verifiers.code.asserts import parsed

PROGRAM_MODULES = frozenset(
    "solution solutions your_solution submission main program candidate answer your_module my_module".split()  # noqa: SIM905
)
"""Names by which tests import the program that they test."""

_ALLOWED = {
    "pytest": {"raises", "approx", "mark", "param", "fixture", "main", "fail"},
    "unittest": {"TestCase", "main"},
}
_REFUSED_MARKS = {"skip", "skipif", "xfail", "usefixtures", "asyncio"}
_PRINTED = {"stdout", "stderr", "stdin"}
_REFUSED = {"redirect_stdout", "redirect_stderr", "skipTest", "assertLogs", "assertNoLogs"}


@dataclass(frozen=True, slots=True)
class Units:
    r"""The parts of a source.

    Example:
        >>> units_of("def test_a():\n    assert f(1) == 2\n").tests
        ('__run__(test_a)',)
    """

    setup: str
    tests: tuple[str, ...]


def units_of(source: str) -> Units | None:
    """A source's test functions and methods; None where it has none.

    Raises:
        ValueError: They need what is not here; the message names it.
    """
    tree = parsed(source)
    fixtures = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _is_fixture(node)}
    tests = [call for node in tree.body for call in _tests_in(node, fixtures)]
    if not tests or _runs_itself(tree):
        return None
    _refuse_what_is_not_here(tree)
    tree.body = [node for node in tree.body if not _starts_runner(node)]
    return Units(ast.unparse(tree), tuple(tests))


def _runs_itself(tree: ast.Module) -> bool:
    """Whether the source calls its functions, or runs its classes and asserts that they went well."""
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    defined = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    rest = [node for node in tree.body if not isinstance(node, defined) and not _starts_runner(node)]
    names = {node.id for part in rest for node in ast.walk(part) if isinstance(node, ast.Name)}
    tests = {name for name in functions if name.startswith("test")}
    return bool(names & tests) or any(isinstance(node, ast.Assert) for node in rest)


def _is_fixture(node: ast.FunctionDef) -> bool:
    return any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)


def _tests_in(node: ast.stmt, fixtures: set[str]) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
        _check(node, fixtures)
        yield f"__run__({node.name})"
    if isinstance(node, ast.ClassDef) and (
        node.name.startswith("Test") or any("TestCase" in ast.unparse(base) for base in node.bases)
    ):
        for method in node.body:
            if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and method.name.startswith("test"):
                _check(method, {*fixtures, "self"})
                yield f"__run__({node.name}, {method.name!r})"


def _check(test: ast.FunctionDef | ast.AsyncFunctionDef, fixtures: set[str]) -> None:
    """Whether a test can be run: not async, and with no arguments but those that its source gives."""
    if isinstance(test, ast.AsyncFunctionDef):
        raise ValueError(f"Expected the tests to be functions, got the coroutine `{test.name}`.")
    given = {
        name.strip()
        for decorator in test.decorator_list
        if isinstance(decorator, ast.Call) and decorator.args and "parametrize" in ast.unparse(decorator.func)
        for name in _names(decorator.args[0])
    }
    unknown = [argument.arg for argument in test.args.args if argument.arg not in given | fixtures]
    if unknown:
        raise ValueError(f"Expected tests without fixtures of pytest's own, got `{test.name}({', '.join(unknown)})`.")


def _names(node: ast.expr) -> list[str]:
    """Argument names of `parametrize`: one text, or several."""
    value = ast.literal_eval(node)
    return value.split(",") if isinstance(value, str) else list(value)


def _starts_runner(node: ast.stmt) -> bool:
    """`unittest.main()`, bare or behind `if __name__ == "__main__"`."""
    text = ast.unparse(node)
    return text.startswith(("unittest.main(", "pytest.main(", "if __name__ =="))


def _refuse_what_is_not_here(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            _refuse_imports(node)
        elif isinstance(node, (ast.Attribute, ast.Name, ast.keyword)):
            _refuse_names(node)


def _refuse_imports(node: ast.ImportFrom) -> None:
    module = str(node.module)
    if module.startswith(("unittest.", "pytest.")):
        raise ValueError(f"Expected tests without `{module}`.")
    for alias in node.names if module in _ALLOWED else ():
        _allow(module, alias.name)


def _refuse_names(node: ast.AST) -> None:
    match node:
        case ast.Attribute(value=ast.Name(id="sys"), attr=name) if name in _PRINTED:
            raise ValueError(f"Expected tests of values, got one that looks at `sys.{name}`.")
        case ast.Attribute(value=ast.Name(id="pytest" | "unittest" as module), attr=name):
            _allow(module, name)
        case ast.Attribute(value=ast.Attribute(attr="mark"), attr=name) if name in _REFUSED_MARKS:
            raise ValueError(f"Expected tests without `pytest.mark.{name}`.")
        case ast.keyword(arg="autouse" | "params" as name):
            raise ValueError(f"Expected fixtures without `{name}`.")
        case ast.Attribute(attr=name) | ast.Name(id=name) if name in _REFUSED:
            raise ValueError(f"Expected tests without `{name}`.")


def _allow(module: str, name: str) -> None:
    if name not in _ALLOWED[module]:
        raise ValueError(f"Expected of {module} no more than {sorted(_ALLOWED[module])}, got `{module}.{name}`.")
