r"""Answers to word problems, made from their equations: the warm start of benchmarks/word_problems.py.

    python benchmarks/word_problems_lessons.py mawps_asdiv_train.jsonl lessons.jsonl

A row has `problem`, `answer` and `equation`: prefix form over the numbers of the text in their order, such as
`- number0 * number1 number2`. Its lesson says the operations in words, in the order in which they are done, and the
calculation in a box, which the verifier computes:

    Multiply, subtract: \boxed{25000 - (1500 * 8)}

Rows whose equation does not give their answer are left out. Nothing here is written by a model.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SAID = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
NEAR = Fraction(1, 1000)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Calculation:
    """An operation on two numbers, each of them given or calculated itself.

    Example:
        >>> inner = Calculation(Fraction(1500), "*", Fraction(8))
        >>> outer = Calculation(Fraction(25000), "-", inner)
        >>> str(outer), outer.value, outer.operations
        ('25000 - (1500 * 8)', Fraction(13000, 1), ['*', '-'])
    """

    left: Fraction | Calculation
    operation: str
    right: Fraction | Calculation

    @property
    def value(self) -> Fraction:
        """What it comes to; ZeroDivisionError where that is nothing."""
        value: Fraction = OPERATIONS[self.operation](*(valued(one) for one in (self.left, self.right)))
        return value

    @property
    def operations(self) -> list[str]:
        """In an order in which they can be done."""
        inner = [one for one in (self.left, self.right) if isinstance(one, Calculation)]
        return [*itertools.chain.from_iterable(one.operations for one in inner), self.operation]

    def ways(self) -> Iterator[Calculation]:
        """It, and what differs only in the order of addends and factors."""
        lefts, rights = (list(one.ways()) if isinstance(one, Calculation) else [one] for one in (self.left, self.right))
        for left, right in itertools.product(lefts, rights):
            yield Calculation(left, self.operation, right)
            if self.operation in "+*":
                yield Calculation(right, self.operation, left)

    def __str__(self) -> str:
        left, right = (f"({one})" if isinstance(one, Calculation) else digits(one) for one in (self.left, self.right))
        return f"{left} {self.operation} {right}"


def valued(one: Fraction | Calculation) -> Fraction:
    """A number, given or calculated."""
    return one.value if isinstance(one, Calculation) else one


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text, in order.

    Example:
        >>> numbers("27 rows with 16.5 chairs")
        [Fraction(27, 1), Fraction(33, 2)]
    """
    return [Fraction(found) for found in NUMBER.findall(text)]


def calculation(problem: str, equation: str) -> Calculation:
    """An equation with the problem's numbers.

    Raises:
        ValueError: if the equation is not one in prefix form over the problem's numbers.

    Example:
        >>> str(calculation("25000 less 1500 times 8", "- number0 * number1 number2"))
        '25000 - (1500 * 8)'
    """
    given = numbers(problem)
    stack: list[Fraction | Calculation] = []
    for word in reversed(equation.split()):
        if word not in OPERATIONS:
            stack.append(_number(word, given, equation))
            continue
        if len(stack) < 2:
            raise ValueError(f"Expected two numbers behind each operation of {equation!r}, got fewer.")
        stack.append(Calculation(stack.pop(), word, stack.pop()))
    if len(stack) != 1 or not isinstance(stack[0], Calculation):
        raise ValueError(f"Expected one equation in prefix form, got {equation!r}.")
    return stack[0]


def _number(word: str, given: list[Fraction], equation: str) -> Fraction:
    """A number of the text by its place, or a constant."""
    place = word.removeprefix("number")
    try:
        return given[int(place)] if place != word else Fraction(word)
    except (ValueError, IndexError) as error:
        raise ValueError(f"Expected numbers of a text with {len(given)} in {equation!r}, got {word!r}.") from error


def digits(value: Fraction) -> str:
    """A number in digits, rounded to four places.

    Example:
        >>> digits(Fraction(12000)), digits(Fraction(1, 3)), digits(Fraction(5, 2))
        ('12000', '0.3333', '2.5')
    """
    return str(value) if value.denominator == 1 else f"{float(value):.4f}".rstrip("0").rstrip(".")


def worked(solved: Calculation) -> str:
    """The operations in words, and the calculation in a box.

    Example:
        >>> print(worked(Calculation(Fraction(7), "-", Fraction(3))))
        Subtract: \\boxed{7 - 3}
    """
    said = ", ".join(SAID[one] for one in solved.operations).capitalize()
    return f"{said}: \\boxed{{{solved}}}"


def checked(row: Mapping[str, Any]) -> Calculation | None:
    """The way to a row's answer; None where its equation does not lead there."""
    try:
        solved = calculation(row["problem"], row["equation"])
        wrong = abs(solved.value - Fraction(row["answer"]))
    except KeyError as error:
        raise SystemExit(f"Expected rows of problem, answer and equation, got one without {error}: {row}") from None
    except (ValueError, ZeroDivisionError):
        return None
    return solved if wrong < NEAR else None


def lessons(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows with a `response`, of those whose equation leads to their answer."""
    for row in rows:
        if solved := checked(row):
            yield {"problem": row["problem"], "answer": row["answer"], "response": worked(solved)}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A jsonl file.

    Raises:
        SystemExit: if a line is not a JSON object.
    """
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                rows.append(dict(json.loads(text)))
            except (ValueError, TypeError):
                where = f"line {number} of {str(path)!r}"
                raise SystemExit(f"Expected a JSON object in {where}, got {text[:60]!r}.") from None
    return rows


def write(target: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a jsonl file; how many rows it has."""
    written_rows = [json.dumps(row) + "\n" for row in rows]
    target.write_text("".join(written_rows), encoding="utf-8")
    return len(written_rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(f"{write(Path(sys.argv[2]), lessons(rows_of(Path(sys.argv[1]))))} lessons: {sys.argv[2]}")
