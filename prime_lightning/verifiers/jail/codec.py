"""Values as strict tagged JSON: `encode` runs beside hostile code, `decode` in the judge, `code/matcher.py` outside.

None, booleans, strings and integers below 2**53 are themselves; everything else is a list that begins with its tag:
`i` integer, `f` float, `c` complex (hexadecimal), `l` list, `t` tuple, `s` set, `z` frozenset, `d` dict, `b` bytes,
`B` bytearray, `r` range, `k` deque, `q` Fraction, `D` Decimal, `h` an object that stays where it is, `cb` a callable
of the other side, `T` a builtin type.

Protects: a subclass is sent as its base class with base-class methods, so overridden `__eq__` and `__iter__` never
matter.
"""

from __future__ import annotations

import builtins
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_SMALL = 1 << 53
_DEEPEST = 150
_MOST_DIGITS = 4000

Other = Callable[[Any], Any]
"""What to send for a value that the codec does not know."""
Resolve = Callable[[str, list[Any]], Any]
"""What an `h` or `cb` entry stands for."""


class Opaque(Exception):  # noqa: N818  (it is news, not an error)
    """A value that does not travel."""


def _refuse(value: Any) -> Any:
    raise Opaque(type(value).__name__)


def encode(value: Any, other: Other = _refuse, depth: int = 0) -> Any:
    """A value as JSON data.

    Args:
        value: Any object.
        other: Called for objects that have no tag.
        depth: Containers around it.

    Raises:
        Opaque: It, or a part of it, has no tag, or it is nested too deeply.

    Example:
        >>> encode((1, 2.5, {"a"})), encode(True), encode(1 << 60)
        (['t', 1, ['f', '0x1.4000000000000p+1'], ['s', 'a']], True, ['i', '0x1000000000000000'])
    """
    if depth > _DEEPEST:
        raise Opaque("nested too deeply")
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    for base, write in _WRITERS:
        if issubclass(kind, base):  # isinstance would believe a forged `__class__`
            return write(value, other, depth + 1)
    if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
        return encode(value.item(), other, depth + 1)  # a numpy scalar
    return other(value)


def _integer(value: int, *_: Any) -> Any:
    plain = int.__add__(value, 0)
    return plain if -_SMALL < plain < _SMALL else ["i", hex(plain)]


def _items(tag: str, iterate: Callable[[Any], Any]) -> Callable[[Any, Other, int], Any]:
    return lambda value, other, depth: [tag, *[encode(part, other, depth) for part in iterate(value)]]


def _dict(value: dict[Any, Any], other: Other, depth: int) -> Any:
    return ["d", *[[encode(key, other, depth), encode(part, other, depth)] for key, part in dict.items(value)]]


_WRITERS: tuple[tuple[type, Callable[[Any, Other, int], Any]], ...] = (
    (int, _integer),
    (str, lambda value, *_: str.__str__(value)),
    (float, lambda value, *_: ["f", float.hex(value)]),
    (list, _items("l", list.__iter__)),
    (tuple, _items("t", tuple.__iter__)),
    (dict, _dict),
    (set, _items("s", set.__iter__)),
    (frozenset, _items("z", frozenset.__iter__)),
    (complex, lambda value, *_: ["c", complex.real.__get__(value).hex(), complex.imag.__get__(value).hex()]),
    (bytes, lambda value, *_: ["b", bytes.hex(value)]),
    (bytearray, lambda value, *_: ["B", bytearray.hex(value)]),
    (range, lambda value, *_: ["r", _integer(value.start), _integer(value.stop), _integer(value.step)]),
    (deque, _items("k", deque.__iter__)),
    (Fraction, lambda value, *_: ["q", hex(int(value.numerator)), hex(int(value.denominator))]),
    (Decimal, lambda value, *_: ["D", Decimal.__str__(value)]),
)


def _refuse_reference(tag: str, _: list[Any]) -> Any:
    raise ValueError(f"the tag {tag!r} means nothing here")


def decode(data: Any, resolve: Resolve = _refuse_reference, depth: int = 0) -> Any:
    """The value of hostile JSON data. It may hash hostile keys: only for a process that can be killed.

    Raises:
        ValueError: It is malformed or nested too deeply.
        TypeError: A set or dict of unhashable values, a tag's argument of a wrong type.

    Example:
        >>> decode(["t", 1, ["d", ["a", ["f", "0x1p-1"]]]])
        (1, {'a': 0.5})
    """
    if depth > _DEEPEST + 10:
        raise ValueError("nested too deeply")
    if data is None or type(data) in (bool, int, str):
        return data
    if type(data) is not list or not data or type(data[0]) is not str:
        raise ValueError("no tag")
    tag, parts = data[0], data[1:]
    if tag in _LEAVES:
        return _LEAVES[tag](*parts)
    if tag in _CONTAINERS:
        return _CONTAINERS[tag](decode(part, resolve, depth + 1) for part in parts)
    if tag == "d":
        return {decode(key, resolve, depth + 1): decode(part, resolve, depth + 1) for key, part in parts}
    return resolve(tag, parts)


def _builtin_type(name: str) -> type:
    kind = getattr(builtins, name)
    if not isinstance(kind, type):
        raise ValueError(f"{name} is no builtin type")
    return kind


def _short(digits: str) -> str:
    if len(digits) > _MOST_DIGITS:  # reducing a fraction takes quadratic time
        raise ValueError("a number too long")
    return digits


_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "l": list, "t": tuple, "s": set, "z": frozenset, "k": deque,
}  # fmt: skip
_LEAVES: dict[str, Callable[..., Any]] = {
    "i": lambda digits: int(digits, 16),
    "f": float.fromhex,
    "c": lambda real, imaginary: complex(float.fromhex(real), float.fromhex(imaginary)),
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "r": lambda start, stop, step: range(decode(start), decode(stop), decode(step)),
    "q": lambda top, bottom: Fraction(int(_short(top), 16), int(_short(bottom), 16)),
    "D": lambda text: Decimal(_short(text)),
    "T": _builtin_type,
}
