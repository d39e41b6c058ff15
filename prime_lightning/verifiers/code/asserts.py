"""What the asserts of a trusted data row need: can they run as plain calls, what do they want, what do they change.

Reads the data set's tests and reference, never a model's program.
"""

from __future__ import annotations

import ast
import builtins
import threading
from dataclasses import dataclass
from typing import Any

from prime_lightning.verifiers.jail.judge import MODULES

_BUILTINS = frozenset(dir(builtins))
_BUILDERS = {"set": set, "frozenset": frozenset, "tuple": tuple, "list": list, "float": float, "complex": complex}
# Inside the arguments of a call these could tell the program what is expected of it, or are too clever to judge.
_TELLTALE = (ast.Compare, ast.BoolOp, ast.IfExp, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)


# CPython 3.11 counts the parser's depth per interpreter, not per thread: two at once raise SystemError. Ours take
# turns, and where somebody else's thread parses too, we try again.
_parsing = threading.Lock()
_TRIES = 20


@dataclass(frozen=True, slots=True)
class Call:
    """One assert as `program's call == known value`; the value never leaves the supervisor."""

    expression: str
    expected: Any


def _bound(tree: ast.AST) -> set[str]:
    """Names that a piece of code gives a value to."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.arg(arg=name)
            ):
                names.add(name)
            case ast.alias(name=name, asname=asname):
                names.add((asname or name).split(".")[0])
            case ast.ExceptHandler(name=str(name)):
                names.add(name)
    return names


def parsed(source: str) -> ast.Module:
    """A module of the data set.

    Raises:
        ValueError: It is no Python.
    """
    for _ in range(_TRIES):
        try:
            with _parsing:
                return ast.parse(source)
        except SystemError:
            continue
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"Expected the tests to be Python, got {source[:80]!r}: {error}") from None
    raise ValueError(f"Python's parser failed {_TRIES} times on {source[:80]!r}.")


def defined_by(reference: str) -> tuple[set[str], dict[str, str]]:
    """Names that a reference solution defines at its top, and the modules it imports by their local names."""
    try:
        body = parsed(reference).body
    except ValueError:
        return set(), {}
    own: set[str] = set()
    modules: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.Import):
            modules |= {
                alias.asname or alias.name: alias.name for alias in node.names if alias.asname or "." not in alias.name
            }
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Assign):
            own |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return own, {local: module for local, module in modules.items() if module in MODULES}


def _constant(node: ast.expr) -> Any:
    """The value of a literal, or of `set((1, 2))`, `float("inf")` and their like.

    Raises:
        ValueError: It is neither.
    """
    match node:
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _BUILDERS:
            return _BUILDERS[name](ast.literal_eval(argument))
        case ast.Call(func=ast.Name(id=name), args=[], keywords=[]) if name in _BUILDERS:
            return _BUILDERS[name]()
    return ast.literal_eval(node)


def _is_call_of(node: ast.expr, own: set[str]) -> bool:
    """Whether a value comes straight out of the program: `f(...)`, `Solution().f(...)`, `f(...).g(...)`."""
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return name in own
        case ast.Call(func=ast.Attribute(value=inner)):
            return _is_call_of(inner, own)
    return False


def as_call(test: str, own: set[str], setup_names: set[str]) -> Call | None:
    """`assert f(1) == 2` as a call and a value; None where the test needs a judge.

    Only a value that comes straight out of the program qualifies: in `abs(f(2) - 12.5) < 1e-6` the program would see
    what is expected of it.

    Example:
        >>> as_call("assert f([1]) == 2", {"f"}, set())
        Call(expression='f([1])', expected=2)
        >>> as_call("assert abs(f(1) - 2) == 0", {"f"}, set()) is None
        True
    """
    match parsed(test).body:
        case [ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]))] if _is_call_of(left, own):
            pass
        case _:
            return None
    known = own | setup_names | _BUILTINS | _bound(left)
    for node in ast.walk(left):
        if isinstance(node, _TELLTALE) or (isinstance(node, ast.Name) and node.id not in known):
            return None
    try:
        return Call(ast.unparse(left), _constant(right))
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None


def called_names(tests: list[str]) -> set[str]:
    """Names that tests call directly and do not define: the program's, where nothing else tells."""
    called: set[str] = set()
    for test in tests:
        tree = parsed(test)
        called |= {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        called -= _bound(tree)
    return called - _BUILTINS


def wanted_names(tests: list[str], own: set[str]) -> set[str]:
    """Names that the tests leave free. A builtin is the program's only if its reference defines it too."""
    free: set[str] = set()
    bound: set[str] = set()
    for test in tests:
        tree = parsed(test)
        loads = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        free |= {name for name in loads - bound if name not in _BUILTINS or name in own}
        bound |= _bound(tree)
    return free - bound


def discards_results(tests: list[str], own: set[str]) -> bool:
    """Whether a test calls the program for what it does to an argument: `sort_in_place(v)` as a statement."""
    for test in tests:
        for node in ast.walk(parsed(test)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _is_call_of(node.value, own):
                arguments = node.value.args
                if isinstance(node.value.func, ast.Name) and any(
                    isinstance(argument, ast.Name) for argument in arguments
                ):
                    return True
    return False


def bound_by(source: str) -> set[str]:
    """Names that the set-up of the tests defines."""
    return _bound(parsed(source))


def imports_of(sources: list[str]) -> dict[str, set[str]]:
    """Modules that sources import at their top, by the first part of their names, and the names taken from each."""
    found: dict[str, set[str]] = {}
    for node in (node for source in sources for node in parsed(source).body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                found.setdefault(root, set()).update(_attributes(sources, alias.asname or root))
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name for alias in node.names} - {"*"}
            found.setdefault(node.module.partition(".")[0], set()).update(names)
    return found


def _attributes(sources: list[str], module: str) -> set[str]:
    """Names that are looked up in a module."""
    nodes = (node for source in sources for node in ast.walk(parsed(source)))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }


def only_imports(source: str) -> bool:
    """Whether a source does nothing but import."""
    body = parsed(source).body
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def defines(source: str, name: str) -> bool:
    """Whether a source defines a function at its top."""
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in parsed(source).body)


def calls_at_top(source: str, name: str) -> bool:
    """Whether a source calls a function as a statement at its top."""
    return any(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == name
        for node in parsed(source).body
    )


def refuse_tests_of_nothing(setup: str, tests: list[str]) -> None:
    """No program can pass a test that asserts nothing, nor can it fail.

    Raises:
        ValueError: A test neither asserts, nor calls what the tests define.
    """
    known = _bound(parsed(setup))
    for test in tests:
        tree = parsed(test)
        known |= _bound(tree)
        if not any(_may_assert(node, known) for node in ast.walk(tree)):
            raise ValueError(f"Expected every test to assert something, got {test[:80]!r}.")
    if not any(_asserts_itself(node) for source in (setup, *tests) for node in ast.walk(parsed(source))):
        raise ValueError("Expected tests with asserts, got none.")


def _may_assert(node: ast.AST, known: set[str]) -> bool:
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return _asserts_itself(node) or (named and node.func.id in {*known, "__run__"})  # type: ignore[attr-defined]


def _asserts_itself(node: ast.AST) -> bool:
    """An assert, a method like unittest's `assertEqual`, or `raises`."""
    return isinstance(node, ast.Assert) or (
        isinstance(node, ast.Call)
        and isinstance(node.func, (ast.Attribute, ast.Name))
        and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id).startswith(
            ("assert", "raises", "fail")
        )
    )
