"""Codec, matcher and wire under generated values and generated rubbish."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
from collections import OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.verifiers.code.matcher import Matching, matches
from prime_lightning.verifiers.jail import codec, wire

numbers = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.complex_numbers(allow_nan=False))
keys = st.recursive(
    st.one_of(st.none(), numbers, st.text(), st.binary()), lambda inner: st.tuples(inner, inner), max_leaves=5
)
values = st.recursive(
    st.one_of(st.none(), numbers, st.text(), st.binary(), st.binary().map(bytearray)),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(keys, inner), st.sets(keys), st.frozensets(keys)
    ),
    max_leaves=25,
)
rubbish = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**18), 10**18),
        st.text(max_size=8),
        st.sampled_from([*"ifclstzdbBrkqDhT", "cb"]),
    ),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=40,
)


def over_the_wire(value: Any) -> Any:
    return wire.loads(wire.dumps(codec.encode(value)))


@given(values)
def test_a_value_arrives_as_it_was(value: Any) -> None:
    arrived = codec.decode(over_the_wire(value))
    assert arrived == value
    assert repr(arrived) == repr(value) or isinstance(value, (set, frozenset, dict, list, tuple))


@given(values)
def test_a_value_matches_itself(value: Any) -> None:
    assert matches(value, over_the_wire(value))


@given(values, values)
def test_matching_is_equality(left: Any, right: Any) -> None:
    """The slow, obvious reference: decode and compare. bytes and bytearray may stand for each other in both."""
    assert matches(left, over_the_wire(right)) == (codec.decode(over_the_wire(right)) == left)


@given(values, rubbish)
def test_rubbish_is_judged_and_never_raises(expected: Any, data: Any) -> None:
    assert matches(expected, data) in (True, False)
    assert matches(expected, data, Matching(tolerance=1e-6, json=True)) in (True, False)


@given(rubbish)
def test_decoding_rubbish_raises_what_the_judge_expects(data: Any) -> None:
    with contextlib.suppress(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError):
        codec.decode(data)


@given(st.binary(max_size=200))
def test_reading_rubbish_raises_what_the_supervisor_expects(data: bytes) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        wire.loads(data)


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"a":1}', b"1.5", b"NaN", b"-Infinity", b"1" * 30, b"\xff", b"", b"[1", b'"\\ud800"x']
)
def test_what_is_not_our_json(line: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        wire.loads(line)


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __add__(self, other: int) -> int:
        return 99

    __hash__ = int.__hash__


class LyingList(list):  # type: ignore[type-arg]
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([1, 2, 3])

    def __len__(self) -> int:
        return 3


class Forged:
    __class__ = int  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Liar(5), 5),
        (LyingList([7]), [7]),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(int, a=1), {"a": 1}),
        (type("S", (str,), {"__str__": lambda self: "lie"})("truth"), "truth"),
        (type("F", (float,), {"hex": lambda self: "0x1p5"})(2.0), 2.0),
        (type("D", (dict,), {"items": lambda self: [("a", 9)]})(a=1), {"a": 1}),
        (-0.0, 0.0),
        (math.inf, math.inf),
        (Fraction(1, 2), 0.5),
        (Decimal("0.5"), 0.5),
        (True, 1),
        (2**70, 2**70),
    ],
)
def test_a_subclass_travels_as_its_base(value: Any, expected: Any) -> None:
    assert matches(expected, over_the_wire(value))


@pytest.mark.parametrize(
    "value", [object(), Forged(), len, int, lambda: 1, iter([1]), math], ids=lambda value: type(value).__name__
)
def test_other_objects_do_not_travel(value: Any) -> None:
    with pytest.raises(codec.Opaque):
        codec.encode(value)


@pytest.mark.parametrize(
    ("expected", "value", "how", "same"),
    [
        (0.3, 0.1 + 0.2, Matching(), False),
        (0.3, 0.1 + 0.2, Matching(tolerance=1e-9), True),
        ([1.0, {"a": 2.5}], [1.0000001, {"a": 2.5}], Matching(tolerance=1e-6), True),
        (5, 6, Matching(tolerance=0.5), False),
        ([1, 2], (1, 2), Matching(), False),
        ([1, 2], (1, 2), Matching(json=True), True),
        ({"1": 2}, {1: 2}, Matching(json=True), True),
        (math.nan, math.nan, Matching(tolerance=1.0), False),
        ([[1]] * 3, [[1]] * 3, Matching(), True),
        (deque([1]), deque([1]), Matching(), False),
    ],
)
def test_matching(expected: Any, value: Any, how: Matching, same: bool) -> None:
    assert matches(expected, over_the_wire(value), how) is same


def test_a_repeated_key_does_not_make_up_for_a_missing_one() -> None:
    assert not matches({"a": 1, "b": 2}, ["d", ["a", 1], ["a", 1]])
    assert not matches({1, 2}, ["s", 1, 1])
    assert not matches({1, 2}, ["s", 1, 2, 2])


def test_frames_and_descriptors_cross() -> None:
    left, right = socket.socketpair()
    with left, right:
        reading, writing = os.pipe()
        wire.send_with_descriptors(left, json.dumps({"x": "y" * 5000}).encode(), [writing])
        message, (copy,) = wire.receive_with_descriptors(right, 4)
        assert json.loads(message) == {"x": "y" * 5000}
        os.write(copy, b"through")
        assert os.read(reading, 9) == b"through"
        for descriptor in (reading, writing, copy):
            os.close(descriptor)
        wire.write_frame(left.fileno(), b"abc")
        assert wire.read_frame(right.fileno()) == b"abc"
        left.sendall(b"\xff\xff\xff\x7f")
        with pytest.raises(ValueError, match="more than"):
            wire.read_frame(right.fileno())
        left.close()
        with pytest.raises(EOFError):
            wire.read_frame(right.fileno())


def test_a_frame_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="more than"):
        wire.write_frame(-1, b"x" * (wire.LIMIT + 1))
