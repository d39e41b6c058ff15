"""The tests' side of `script` mode: no model code runs here. The program's objects are handles that forward requests.

Protects: no comparison, arithmetic or `in` is ever forwarded, for that would show the program what is expected and
let it lie about the outcome; `==` between handles is identity. A handle's class cannot be forged, AssertionError and
StopIteration do not cross, every frame is checked, asserts are counted.
Leaves out: exception classes that the
program defines (tests cannot name them), `==` that the program defines.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

from prime_lightning.verifiers.jail import codec, units, wire

MODULES = frozenset(
    {
        *(
            "math",
            "sys",
            "re",
            "collections",
            "itertools",
            "functools",
            "heapq",
            "string",
            "random",
            "datetime",
            "copy",
        ),
        *("operator", "cmath", "fractions", "decimal", "statistics", "bisect", "json", "typing", "numpy"),
    }
)
"""Modules that tests may use without importing them; whatever the program made of the name, they get the real one."""

_MOST_ITEMS = 200_000
_NOT_CROSSING = (AssertionError, StopIteration, StopAsyncIteration)


class RemoteError(Exception):
    """The program raised something that is no builtin exception, or that must not cross."""


class Lost(BaseException):
    """The program is gone, or does not keep to the protocol. Tests cannot catch it by `except Exception`."""

    happened = False
    """Whether it was ever raised here, whatever the tests made of it."""

    def __init__(self) -> None:
        super().__init__()
        Lost.happened = True


class Handle:
    """An object of the program."""

    __slots__ = ("__id", "__iterable", "__kind", "__talk")

    def __init__(self, talk: _Conversation, number: int, kind: str, iterable: bool) -> None:
        for name, value in (("talk", talk), ("id", number), ("kind", kind), ("iterable", iterable)):
            object.__setattr__(self, f"_Handle__{name}", value)

    def __eq__(self, other: object) -> bool:
        return type(other) is Handle and other.__id == self.__id

    def __hash__(self) -> int:
        return hash(("handle", self.__id))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have the program call it."""
        talk = self.__talk
        return talk.request(["call", self.__id, talk.encode(list(args)), talk.encode(kwargs)], args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__name__":
            raise AttributeError(name)
        return self.__talk.request(["get", self.__id, name])

    def __setattr__(self, name: str, value: Any) -> None:
        self.__talk.request(["set", self.__id, name, self.__talk.encode(value)])

    def __getitem__(self, key: Any) -> Any:
        return self.__talk.request(["item", self.__id, self.__talk.encode(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__talk.request(["put", self.__id, self.__talk.encode(key), self.__talk.encode(value)])

    def __len__(self) -> int:
        length = self.__talk.request(["len", self.__id])
        if type(length) is not int:
            raise TypeError("a length that is no integer")
        return length

    def __str__(self) -> str:
        text = self.__talk.request(["str", self.__id])
        return text if type(text) is str else f"<candidate {self.__kind}>"

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        if not self.__iterable:
            raise TypeError(f"'{self.__kind}' object is not iterable")
        iterator = self.__talk.request(["iter", self.__id])
        if type(iterator) is not Handle:
            raise TypeError("an iterator that is none")
        for _ in range(_MOST_ITEMS):
            try:
                item = iterator.__next__()
            except StopIteration:
                return
            yield item
        raise ValueError(f"more than {_MOST_ITEMS} items")

    def __next__(self) -> Any:
        return self.__talk.request(["next", self.__id])

    def __repr__(self) -> str:
        return f"<candidate {self.__kind}>"


class Missing:
    """A name that the tests want and the program lacks: no test passes for the error that its use would be."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        """End the run."""
        raise Lost

    def __getattr__(self, name: str) -> Any:
        raise Lost


class _Conversation:
    """Requests to the program."""

    def __init__(self, channel: int, in_place: bool) -> None:
        self._channel, self._in_place = channel, in_place
        self._callbacks: list[Any] = []

    def _send(self, frame: list[Any]) -> None:
        try:
            wire.write_frame(self._channel, wire.dumps(frame))
        except OSError:
            raise Lost from None

    def receive(self) -> list[Any]:
        """The next frame of the program; `Lost` if it is none."""
        try:
            frame = wire.loads(wire.read_frame(self._channel))
        except (EOFError, OSError, ValueError, RecursionError):
            raise Lost from None
        if type(frame) is not list or not frame:
            raise Lost
        return frame

    def _handle(self, value: Any) -> list[Any]:
        if type(value) is Handle:
            return ["h", value._Handle__id]
        if isinstance(value, type) and value in vars(builtins).values():
            return ["T", str(value.__name__)]
        self._callbacks.append(value)
        return ["cb", len(self._callbacks) - 1]

    def encode(self, value: Any) -> Any:
        """A value for the program."""
        return codec.encode(value, self._handle)

    def decode(self, data: Any) -> Any:
        """A value from the program; `Lost` if it is none."""
        try:
            return codec.decode(data, self._resolve)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError):
            raise Lost from None

    def _resolve(self, tag: str, parts: list[Any]) -> Any:
        if tag == "cb":
            return self._callbacks[parts[0]]
        number, kind, iterable = parts
        if tag != "h" or type(number) is not int:
            raise ValueError(tag)
        return Handle(self, number, str(kind)[:60], iterable is True)

    def request(self, frame: list[Any], args: tuple[Any, ...] = ()) -> Any:
        """One request to the program, with the calls back that it makes before it answers."""
        self._send(frame)
        while True:
            match self.receive():
                case ["V", data, list(changes)]:
                    value = self.decode(data)
                    if self._in_place:
                        self._apply(args, changes)
                    return value
                case ["S"] if frame[0] == "next":
                    raise StopIteration
                case ["E", str(name), str(message)]:
                    raise _exception(name, message[:300])
                case ["K", int(number), list(given), list(named)] if 0 <= number < len(self._callbacks):
                    self._call_back(self._callbacks[number], self.decode(given), self.decode(named))
                case _:
                    raise Lost

    def _call_back(self, function: Any, args: Any, kwargs: Any) -> None:
        if type(args) is not list or type(kwargs) is not dict:
            raise Lost
        try:
            answer = ["R", self.encode(function(*args, **kwargs))]
        except Exception as error:
            answer = ["RX", type(error).__name__, str(error)[:200]]
        self._send(answer)

    def _apply(self, args: tuple[Any, ...], changes: list[Any]) -> None:
        """Give the arguments the contents that the program left in its copies."""
        for change in changes:
            if (
                type(change) is not list
                or len(change) != 2
                or type(change[0]) is not int
                or not 0 <= change[0] < len(args)
            ):
                raise Lost
            target, content = args[change[0]], self.decode(change[1])
            if type(target) is not type(content):
                raise Lost
            if isinstance(target, (list, bytearray)):
                target[:] = content
            elif isinstance(target, (dict, set)):
                target.clear()
                target.update(content)


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _NOT_CROSSING):
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError wants five arguments
            return RemoteError(name[:80])
    return RemoteError(name[:80])


class _CountAsserts(ast.NodeTransformer):
    """Adds a call after every assert, also one by a method or a context, so that one never reached is noticed."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return self._counted(node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | list[ast.stmt]:
        return self._counted(node) if self._asserts(node.value) else node

    def visit_With(self, node: ast.With) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return self._counted(node) if any(self._asserts(item.context_expr) for item in node.items) else node

    @staticmethod
    def _counted(node: ast.stmt) -> list[ast.stmt]:
        counted = ast.Expr(ast.Call(ast.Name("__count__", ast.Load()), [], []))
        return [node, ast.copy_location(counted, node)]

    @staticmethod
    def _asserts(node: ast.expr) -> bool:
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) | ast.Call(func=ast.Name(id=name)):
                return name.startswith("assert") or name == "raises"
        return False


def _environment(talk: _Conversation, defined: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Globals of the tests: of the program only what they need, and modules that are the judge's own."""
    names = {name: value for name, value in defined if type(name) is str}
    units.install()
    space: dict[str, Any] = {"__name__": "__tests__", "__builtins__": builtins, "__run__": units.run}
    for name in job["names"]:
        space[name] = talk.decode(names[name]) if name in names else Missing()
    for alias in job["aliases"]:
        program = types.ModuleType(alias)
        vars(program).update({name: space[name] for name in job["names"] if name in names})
        sys.modules[alias] = program
    for name, module in job["modules"].items():
        if module in MODULES:
            space[name] = importlib.import_module(module)
    return space


def judge(channel: int, job: dict[str, Any]) -> list[Any]:
    """Run the tests one by one against the program behind `channel`.

    Args:
        channel: To the candidate.
        job: `setup` source, `tests` sources, `names` wanted of the program, `modules` wanted of the library (local
            name -> module), `aliases`: modules by which they import the program, `in_place`: whether changes of
            arguments count.

    Returns:
        `["T", [passed, asserts executed, error], ...]`, one entry per test begun, or `["X", error]` if the program
        did not load.
    """
    talk = _Conversation(channel, job["in_place"])
    try:
        match talk.receive():
            case ["names", list(defined)]:
                space = _environment(talk, defined, job)
            case ["E", str(name), str()]:
                return ["X", name[:80]]
            case _:
                return ["X", "bad frame"]
    except (Lost, ValueError, TypeError):
        return ["X", "died while loading"]
    return ["T", *_run(job["setup"], job["tests"], space)]


def _run(setup: str, tests: list[str], space: dict[str, Any]) -> list[list[Any]]:
    executed = 0

    def count() -> None:
        nonlocal executed
        executed += 1

    space["__count__"] = count
    results: list[list[Any]] = []
    for number, test in enumerate([setup, *tests]):
        before = executed
        error = ""
        try:
            tree = ast.fix_missing_locations(_CountAsserts().visit(ast.parse(test)))
            exec(compile(tree, "<tests>", "exec"), space)
        except BaseException as raised:
            error = type(raised).__name__[:80]
        if Lost.happened:  # whatever a test made of it
            results.append([False, 0, "lost"])
            break
        if number or error:
            results.append([not error, executed - before, error])
        if not number and error:
            break
    return results
