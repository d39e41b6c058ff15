"""Does encoded hostile data equal a trusted value: a walk along the trusted one.

Protects: no table is built from hostile keys, nothing is compared by hostile methods, and the work is bounded by the
size of the trusted value, which consists of what Python literals can write. Equality is Python's (`1 == 1.0 == True`,
a list is no tuple), with tolerance and JSON's habits on request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prime_lightning.verifiers.jail.codec import decode

_DEEPEST = 160
_MOST_IN_KEY = 1000  # a frozenset of chosen integers hashes them all into one chain: quadratic time


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """How strictly to compare.

    Example:
        >>> matches([1, 2.0], ["t", 1, ["f", "0x1.0000000000001p+1"]], Matching(tolerance=1e-6, json=True))
        True
    """

    tolerance: float = 0.0
    """Relative and absolute error allowed where either side is a float."""
    json: bool = False
    """The trusted value came from JSON: a tuple may stand for its list, integers for its string keys."""


_EXACT = Matching()
_BAD = object()


def matches(expected: Any, data: Any, how: Matching = _EXACT, depth: int = 0) -> bool:
    """Whether `data`, as `codec.encode` writes, is the value `expected`.

    Example:
        >>> matches({1: [2]}, ["d", [1, ["l", 2]]]), matches([1], ["t", 1]), matches(1, True), matches("1", 1)
        (True, False, True, False)
    """
    if depth > _DEEPEST:
        return False
    if expected is None or data is None:
        return expected is data
    compare = _BY_TYPE.get(type(expected))
    return compare is not None and compare(expected, data, how, depth + 1)


def _number(data: Any) -> Any:
    """The number that `data` encodes, or `_BAD`."""
    if type(data) in (bool, int):
        return data
    if type(data) is list and len(data) in (2, 3) and data[0] in ("i", "f", "c", "q", "D"):
        try:
            return decode(data)
        except (ValueError, TypeError, ArithmeticError):
            return _BAD
    return _BAD


def _numbers(expected: Any, data: Any, how: Matching, _: int) -> bool:
    value = _number(data)
    if value is _BAD:
        return False
    try:
        if value == expected:
            return True
    except ArithmeticError:  # a signalling Decimal NaN
        return False
    floats = isinstance(expected, float) or isinstance(value, float)
    if not how.tolerance or not floats or isinstance(expected, complex) or isinstance(value, complex):
        return False
    try:
        return math.isclose(value, expected, rel_tol=how.tolerance, abs_tol=how.tolerance)
    except (ArithmeticError, ValueError):
        return False


def _text(expected: str, data: Any, _: Matching, __: int) -> bool:
    return type(data) is str and data == expected


def _binary(expected: bytes | bytearray, data: Any, _: Matching, __: int) -> bool:
    return type(data) is list and len(data) == 2 and data[0] in ("b", "B") and data[1] == expected.hex()


def _sequence(tag: str) -> Callable[[Any, Any, Matching, int], bool]:
    def compare(expected: Any, data: Any, how: Matching, depth: int) -> bool:
        if type(data) is not list or len(data) != len(expected) + 1:
            return False
        if data[0] != tag and not (how.json and data[0] in ("l", "t")):
            return False
        return all(matches(wanted, part, how, depth) for wanted, part in zip(expected, data[1:], strict=True))

    return compare


def _key(data: Any, depth: int = 0) -> Any:
    """A hashable value, or `_BAD`. Only its hash is taken before it is looked up in a trusted table."""
    if data is None or type(data) is str:
        return data
    number = _number(data)
    if number is not _BAD or type(data) is not list or not data or depth > 50 or len(data) > _MOST_IN_KEY:
        return number
    if data[0] in ("t", "z"):
        parts = [_key(part, depth + 1) for part in data[1:]]
        if any(part is _BAD for part in parts):
            return _BAD
        return tuple(parts) if data[0] == "t" else frozenset(parts)
    if data[0] == "b" and len(data) == 2 and type(data[1]) is str:
        try:
            return bytes.fromhex(data[1])
        except ValueError:
            return _BAD
    return _BAD


def _set(expected: Any, data: Any, _: Matching, __: int) -> bool:
    if type(data) is not list or len(data) != len(expected) + 1 or data[0] not in ("s", "z"):
        return False
    seen = set()
    for part in data[1:]:
        value = _key(part)
        if value is _BAD or value not in expected:
            return False
        seen.add(value)  # members of the trusted set only
    return len(seen) == len(expected)


def _dict(expected: dict[Any, Any], data: Any, how: Matching, depth: int) -> bool:
    if type(data) is not list or len(data) != len(expected) + 1 or data[0] != "d":
        return False
    seen = set()
    for entry in data[1:]:
        if type(entry) is not list or len(entry) != 2:
            return False
        key = _key(entry[0])
        if how.json and type(key) is int:
            key = str(key)
        if key is _BAD or key not in expected or not matches(expected[key], entry[1], how, depth):
            return False
        seen.add(key)
    return len(seen) == len(expected)


_BY_TYPE: dict[type, Callable[[Any, Any, Matching, int], bool]] = {
    bool: _numbers,
    int: _numbers,
    float: _numbers,
    complex: _numbers,
    str: _text,
    bytes: _binary,
    bytearray: _binary,
    list: _sequence("l"),
    tuple: _sequence("t"),
    set: _set,
    frozenset: _set,
    dict: _dict,
}
