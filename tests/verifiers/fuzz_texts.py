"""Coverage-guided fuzzing of what reads hostile bytes outside a jail: wire, codec, matcher, extractors, comparison.

By hand: `python tests/verifiers/fuzz_texts.py -max_total_time=600`, with atheris; `test_fuzz.py` runs it for a moment.
A finding is an exception that the callers do not expect, a broken promise (asserts below), or a hang (`-timeout`).
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports():
    from prime_lightning.verifiers.code.matcher import Matching, matches
    from prime_lightning.verifiers.code.run import same_output
    from prime_lightning.verifiers.code.text import program
    from prime_lightning.verifiers.jail import codec, wire
    from prime_lightning.verifiers.maths.answer import answer_of
    from prime_lightning.verifiers.maths.compare import Question, compare, self_question
    from prime_lightning.verifiers.maths.text import boxes, normalise
    from prime_lightning.verifiers.options import MathOptions

EXPECTED = [
    None,
    1,
    2.5,
    "a",
    [1, [2]],
    (1, "x"),
    {1, 2},
    {"a": [1], 2: {3.5}},
    {frozenset({1}), (1, 2)},
    b"ab",
    3 + 4j,
]
REFERENCES = [
    "1",
    r"\frac{1}{2}",
    "(1,2)",
    r"\{1,2\}",
    "[0,1)",
    "1,2",
    r"5\text{ cm}",
    r"50\%",
    "10_2",
    "B",
    r"\pm 2",
    "x=5",
    "yes",
]
LENIENT = MathOptions()
STRICT = MathOptions(
    percent="strict", units="strict", bases="ignore", ordered_lists=True, tolerance=0.0, answer="final"
)


def frames(data: bytes) -> None:
    """A line of a program's output: parsed, matched, decoded."""
    try:
        value = wire.loads(data)
    except (ValueError, RecursionError):
        return
    for expected in EXPECTED:
        strict = matches(expected, value)
        loose = matches(expected, value, Matching(tolerance=1e-6, json=True))
        assert loose or not strict, (expected, value)
    with contextlib.suppress(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError):
        decoded = codec.decode(value)
        with contextlib.suppress(codec.Opaque):
            assert wire.loads(wire.dumps(codec.encode(decoded))) is not None or decoded is None


def answers(text: str) -> None:
    """A completion: boxes, normalised forms, comparison in both directions."""
    for box in boxes(text):
        assert box.removeprefix("-") in text
    answer = answer_of(text, STRICT) or text[:1000]
    normalise(answer)
    for reference in REFERENCES:
        for options in (LENIENT, STRICT):
            assert isinstance(compare(reference, answer, options), (bool, Question))
            assert isinstance(compare(answer, reference, options), (bool, Question))
    assert isinstance(self_question(answer), (str, Question))


def one_input(data: bytes) -> None:
    """What atheris calls."""
    if not data:
        return
    kind, rest = data[0] % 3, data[1:]
    if kind == 0:
        frames(rest)
    elif kind == 1:
        answers(rest.decode("utf-8", "replace") if data[0] & 64 else rest.decode("latin-1"))
    else:
        assert isinstance(program(rest.decode("latin-1"), "f"), str)
        same_output(rest, "1 2.5\nx", 1e-6)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
