r"""Worked answers to word problems, made from their equations: the warm start of benchmarks/word_problems.py.

    python benchmarks/word_problems_lessons.py mawps_asdiv_train.jsonl lessons.jsonl

A row has `problem`, `answer` and `equation`: prefix form over the numbers of the text in their order, such as
`- number0 * number1 number2`. Its lesson says each operation in a word and in numbers, a line each, and ends in a box:

    Multiply: 1500 * 8 = 12000
    Subtract: 25000 - 12000 = 13000
    \boxed{13000}

Rows whose equation does not give their answer are left out. Nothing here is written by a model.
"""

from __future__ import annotations

import itertools
import json
import operator
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SAID = {"+": "Add", "-": "Subtract", "*": "Multiply", "/": "Divide"}
NEAR = Fraction(1, 1000)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_LINE = re.compile(
    r"\w+: (?P<left>-?\d+(?:\.\d+)?) (?P<operation>[-+*/]) (?P<right>-?\d+(?:\.\d+)?) = (?P<result>-?\d+(?:\.\d+)?)"
)


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


def line(step: Step) -> str:
    """A step in a word and numbers.

    Example:
        >>> line(Step(Fraction(7), "-", Fraction(3)))
        'Subtract: 7 - 3 = 4'
    """
    left, right = written(step.left), written(step.right)
    return f"{SAID[step.operation]}: {left} {step.operation} {right} = {written(step.result)}"


def worked(steps: list[Step]) -> str:
    """All steps and the box."""
    return "\n".join([*map(line, steps), f"\\boxed{{{written(steps[-1].result)}}}"])


def checked(row: Mapping[str, Any]) -> list[Step] | None:
    """The steps to a row's answer; None where its equation does not lead there."""
    try:
        steps = solution(row["problem"], row["equation"])
        wrong = abs(steps[-1].result - Fraction(row["answer"]))
    except KeyError as error:
        raise SystemExit(f"Expected rows of problem, answer and equation, got one without {error}: {row}") from None
    except (ValueError, ZeroDivisionError):
        return None
    return steps if wrong < NEAR else None


def lessons(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows with a `response`, of those whose equation leads to their answer."""
    for row in rows:
        if steps := checked(row):
            yield {"problem": row["problem"], "answer": row["answer"], "response": worked(steps)}


def set_up(text: str) -> Fraction | None:
    """What the lines of an answer come to if each is computed right; None where they are not lines of `worked`.

    A wrong result that a later line takes up is replaced there: what counts is which numbers are taken, and what is
    done with them.

    Example:
        >>> print(set_up("Multiply: 3 * 9 = 28\\nSubtract: 28 - 7 = 20\\n\\\\boxed{20}"))
        20
        >>> print(set_up("Multiply: 3 * 9 = 28\\nSubtract: 28 - 8 = 20\\n\\\\boxed{20}"))
        19
    """
    computed: dict[Fraction, Fraction] = {}
    value = None
    for one in text.strip().splitlines()[:-1]:
        found = _LINE.fullmatch(one.strip())
        if found is None:
            return None
        left, right, result = (Fraction(found[part]) for part in ("left", "right", "result"))
        step = Step(computed.get(left, left), found["operation"], computed.get(right, right))
        if step.operation == "/" and not step.right:
            return None
        value = computed[result] = step.result
    return value


def prepared(answers: Sequence[Mapping[str, Any]]) -> float:
    """The share of answers that would be right if each line were computed right.

    Args:
        answers: With `completion` and `answer`.

    Example:
        >>> prepared([{"completion": "Add: 3 + 9 = 13\\n\\\\boxed{13}", "answer": "12"}])
        1.0
    """
    found = [(set_up(one["completion"]), Fraction(one["answer"])) for one in answers]
    return sum(value is not None and abs(value - answer) < NEAR for value, answer in found) / len(found)


def drills(count: int, sums: int = 10, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Lessons that are sums alone: a small model knows which numbers to take before it can compute with them.

    Example:
        >>> lesson = next(drills(1, sums=2))
        >>> print(lesson["problem"], lesson["response"], sep="\\n")
        10 * 64, 76 * 5
        Multiply: 10 * 64 = 640
        Multiply: 76 * 5 = 380
        \\boxed{380}
    """
    rng = random.Random(seed)
    for _ in range(count):
        steps = [_sum(rng) for _ in range(sums)]
        asked = ", ".join(f"{written(one.left)} {one.operation} {written(one.right)}" for one in steps)
        yield {"problem": asked, "answer": written(steps[-1].result), "response": worked(steps)}


def _sum(rng: random.Random) -> Step:
    """Of two or three digits, or a product of a number up to 99 and one up to 12; nothing below zero, no rest."""
    operation = rng.choice("++---**//")
    if operation in "+-":
        top = rng.choice((20, 99, 99, 999))
        small, great = sorted(Fraction(rng.randint(1, top)) for _ in range(2))
        left, right = (great, small) if operation == "-" or rng.random() < 0.5 else (small, great)
        return Step(left, operation, right)
    one, other = (Fraction(rng.randint(2, top)) for top in rng.sample((12, rng.choice((12, 99))), 2))
    return Step(one, "*", other) if operation == "*" else Step(one * other, "/", one)


def one_step(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The problems of one operation, as many of each as of the rarest, first those that give a number too many.

    SVAMP's are of this kind: one operation, often with a number that misleads. Additions are the largest part of the
    file, and few of its problems mislead; whoever learns from rewards for them learns to add, and to use every number.

    Example:
        >>> given = [("2, 3", "5", "+"), ("2, 3, 9", "5", "+"), ("2, 3", "6", "*")]
        >>> made = [{"problem": p, "answer": a, "equation": f"{sign} number0 number1"} for p, a, sign in given]
        >>> [row["problem"] for row in one_step(made)]
        ['2, 3, 9', '2, 3']
    """
    begun = [(steps[0].operation, row) for row in rows if len(steps := checked(row) or ()) == 1]
    begun.sort(key=lambda pair: len(numbers(pair[1]["problem"])) <= 2)  # stable: else in their order
    count = min(Counter(operation for operation, _ in begun).values(), default=0)
    places: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    return [row for operation, row in begun if next(places[operation]) < count]


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
