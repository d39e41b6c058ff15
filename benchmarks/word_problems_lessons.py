r"""Worked answers to word problems, made from their equations: the warm start of benchmarks/word_problems.py.

    python benchmarks/word_problems_lessons.py mawps_asdiv_train.jsonl lessons.jsonl

A row has `problem`, `answer` and `equation`: prefix form over the numbers of the text in their order, such as
`- number0 * number1 number2`. Its lesson says each operation in words and numbers, a line each, and ends in a box:

    First, multiply 1500 by 8: 1500 * 8 = 12000.
    Then, subtract 12000 from 25000: 25000 - 12000 = 13000.
    The answer is \boxed{13000}.

Rows whose equation does not give their answer are left out. Nothing here is written by a model.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SAID = {"+": "add {0} and {1}", "-": "subtract {1} from {0}", "*": "multiply {0} by {1}", "/": "divide {0} by {1}"}
BEGINNINGS = ("First", "Then", "Next", "After that", "Finally")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Step:
    """One operation of a solution."""

    left: Fraction
    operation: str
    right: Fraction

    @property
    def result(self) -> Fraction:
        """What it gives; ZeroDivisionError where there is none."""
        value: Fraction = OPERATIONS[self.operation](self.left, self.right)
        return value


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text, in order.

    Example:
        >>> numbers("27 rows with 16.5 chairs")
        [Fraction(27, 1), Fraction(33, 2)]
    """
    return [Fraction(found) for found in _NUMBER.findall(text)]


def solution(problem: str, equation: str) -> list[Step]:
    """The operations of an equation in the order in which they can be computed.

    Raises:
        ValueError: if the equation is not one in prefix form over the problem's numbers.

    Example:
        >>> [str(step.result) for step in solution("25000 less 1500 times 8", "- number0 * number1 number2")]
        ['12000', '13000']
    """
    given, stack, steps = numbers(problem), [], []
    for word in reversed(equation.split()):
        if word not in OPERATIONS:
            stack.append(_value(word, given, equation))
            continue
        if len(stack) < 2:
            raise ValueError(f"Expected two numbers behind each operation of {equation!r}, got fewer.")
        steps.append(Step(stack.pop(), word, stack.pop()))
        stack.append(steps[-1].result)
    if len(stack) != 1 or not steps:
        raise ValueError(f"Expected one equation in prefix form, got {equation!r}.")
    return steps


def _value(word: str, given: list[Fraction], equation: str) -> Fraction:
    """A number of the text by its place, or a constant."""
    place = word.removeprefix("number")
    try:
        return given[int(place)] if place != word else Fraction(word)
    except (ValueError, IndexError) as error:
        raise ValueError(f"Expected numbers of a text with {len(given)} in {equation!r}, got {word!r}.") from error


def written(value: Fraction) -> str:
    """A number in digits, rounded to four places.

    Example:
        >>> written(Fraction(12000)), written(Fraction(1, 3)), written(Fraction(5, 2))
        ('12000', '0.3333', '2.5')
    """
    return str(value) if value.denominator == 1 else f"{float(value):.4f}".rstrip("0").rstrip(".")


def line(step: Step, beginning: str) -> str:
    """A step in words and numbers.

    Example:
        >>> line(Step(Fraction(7), "-", Fraction(3)), "First")
        'First, subtract 3 from 7: 7 - 3 = 4.'
    """
    left, right = written(step.left), written(step.right)
    said = SAID[step.operation].format(left, right)
    return f"{beginning}, {said}: {left} {step.operation} {right} = {written(step.result)}."


def worked(steps: list[Step]) -> str:
    """All steps and the box."""
    lines = [line(step, BEGINNINGS[min(i, len(BEGINNINGS) - 1)]) for i, step in enumerate(steps)]
    return "\n".join([*lines, f"The answer is \\boxed{{{written(steps[-1].result)}}}."])


def checked(row: Mapping[str, Any]) -> list[Step] | None:
    """The steps to a row's answer; None where its equation does not lead there."""
    try:
        steps = solution(row["problem"], row["equation"])
        wrong = abs(steps[-1].result - Fraction(row["answer"]))
    except (ValueError, ZeroDivisionError):
        return None
    return steps if wrong < Fraction(1, 1000) else None


def lessons(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows with a `response`, of those whose equation leads to their answer."""
    for row in rows:
        if steps := checked(row):
            yield {"problem": row["problem"], "answer": row["answer"], "response": worked(steps)}


def evenly(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """As many rows of each operation that begins a solution as there are of the rarest, in their order.

    Nearly half of the first problems begin with an addition; whoever learns from rewards for them learns to add.

    Example:
        >>> made = [{"problem": "2, 3", "answer": a, "equation": f"{e} number0 number1"} for a, e in ("5+", "5+", "6*")]
        >>> [row["answer"] for row in evenly(made)]
        ['5', '6']
    """
    begun = [(steps[0].operation, row) for row in rows if (steps := checked(row))]
    count = min(Counter(operation for operation, _ in begun).values(), default=0)
    places: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    return [row for operation, row in begun if next(places[operation]) < count]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A jsonl file."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def write(target: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a jsonl file; how many rows it has."""
    written_rows = [json.dumps(row) + "\n" for row in rows]
    target.write_text("".join(written_rows), encoding="utf-8")
    return len(written_rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(f"{write(Path(sys.argv[2]), lessons(rows_of(Path(sys.argv[1]))))} lessons: {sys.argv[2]}")
