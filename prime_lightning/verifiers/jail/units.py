"""Runs test functions and classes in the judge, and stands in for the little of pytest that tests of data sets use.

No model code is here: what a test sees of the program are values and handles, see `judge.py`.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

_fixtures: dict[str, Callable[..., Any]] = {}


class Raises:
    """`pytest.raises(ValueError, match="...")`."""

    def __init__(self, expected: Any, match: str | None) -> None:
        self._expected, self._match = expected, match
        self.value: BaseException | None = None

    def __enter__(self) -> Raises:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if kind is None:
            raise AssertionError(f"{self._expected} was not raised")
        self.value = error
        if not issubclass(kind, self._expected):
            return False
        if self._match is not None and not re.search(self._match, str(error)):
            raise AssertionError(f"{error} does not match {self._match}")
        return True


def raises(expected: Any, function: Any = None, *args: Any, match: str | None = None, **kwargs: Any) -> Raises:
    """A context, or the call of a function within it."""
    context = Raises(expected, match)
    if function is not None:
        with context:
            function(*args, **kwargs)
    return context


class Approx:
    """`pytest.approx(value)`: equal to what is near, number by number."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None) -> None:
        self._expected = expected
        self._near = {
            "rel_tol": 1e-6 if rel is None and abs is None else rel or 0.0,
            "abs_tol": 1e-12 if abs is None else abs,
        }

    def __eq__(self, other: object) -> bool:
        return self._agrees(self._expected, other)

    def _agrees(self, expected: Any, given: Any) -> bool:
        if isinstance(expected, (list, tuple)):
            same = type(given) in (list, tuple) and len(given) == len(expected)
            return same and all(itertools.starmap(self._agrees, zip(expected, given, strict=True)))
        if isinstance(expected, dict):
            same = type(given) is dict and given.keys() == expected.keys()
            return same and all(self._agrees(expected[key], given[key]) for key in expected)
        if type(expected) in (int, float) and type(given) in (int, float):
            return math.isclose(given, expected, **self._near)
        return type(given) is type(expected) and bool(given == expected)


def _parametrize(names: Any, values: Any, **_: Any) -> Callable[[Any], Any]:
    listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    cases = [dict(zip(listed, value if len(listed) > 1 else _single(value), strict=True)) for value in values]

    def mark(function: Any) -> Any:
        function.__cases__ = [cases, *getattr(function, "__cases__", [])]
        return function

    return mark


class _Param(tuple[Any, ...]):
    """`pytest.param(...)`."""


def _single(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, _Param) else (value,)


class _Mark:
    parametrize = staticmethod(_parametrize)

    def __getattr__(self, name: str) -> Any:
        def mark(*args: Any, **_: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else lambda function: function

        return mark


def _fixture(function: Any = None, **_: Any) -> Any:
    if function is None:
        return _fixture
    _fixtures[function.__name__] = function
    return function


def _fail(reason: str = "", **_: Any) -> None:
    raise AssertionError(reason)


def install() -> None:
    """Let tests import the stand-in as `pytest`."""
    module: Any = types.ModuleType("pytest")
    module.raises, module.approx, module.mark, module.fixture = raises, Approx, _Mark(), _fixture
    module.param = lambda *values, **_: _Param(values)
    module.fail, module.main = _fail, lambda *_, **__: 0
    sys.modules["pytest"] = module


def run(target: Any, method: str = "") -> None:
    """Run one test: a function with all its cases, or a method of a class."""
    if not method:
        _with_cases(target)
    elif issubclass(target, unittest.TestCase):
        _with_set_up(target, target(method), method, ("setUpClass", "setUp", "tearDown", "tearDownClass"))
    else:
        _with_set_up(target, target(), method, ("setup_class", "setup_method", "teardown_method", "teardown_class"))


def _with_set_up(kind: Any, instance: Any, method: str, names: tuple[str, ...]) -> None:
    for owner, name in ((kind, names[0]), (instance, names[1])):
        _call_if_there(owner, name, instance, method)
    try:
        _with_cases(getattr(instance, method))
    finally:
        for owner, name in ((instance, names[2]), (kind, names[3])):
            _call_if_there(owner, name, instance, method)


def _call_if_there(owner: Any, name: str, instance: Any, method: str) -> None:
    function = getattr(owner, name, None)
    if function is not None:
        function(*[getattr(instance, method)] * len(inspect.signature(function).parameters))


def _with_cases(function: Any) -> None:
    for chosen in itertools.product(*getattr(function, "__cases__", [])):
        given = {name: value for case in chosen for name, value in case.items()}
        opened: list[Iterator[Any]] = []
        try:
            function(**_arguments(function, given, opened))
        finally:
            for generator in reversed(opened):
                next(generator, None)


def _arguments(function: Any, given: dict[str, Any], opened: list[Iterator[Any]]) -> dict[str, Any]:
    """What a function's parameters get: a case's values, else fixtures."""
    wanted = inspect.signature(function).parameters
    return {
        name: given[name] if name in given else _made(name, opened)
        for name in wanted
        if name in given or name in _fixtures
    }


def _made(name: str, opened: list[Iterator[Any]]) -> Any:
    made = _fixtures[name](**_arguments(_fixtures[name], {}, opened))
    if isinstance(made, types.GeneratorType):
        opened.append(made)
        return next(made)
    return made
