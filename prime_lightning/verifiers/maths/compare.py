"""Reference against answer: structure first (lists, sets, intervals, labels), then values, then a question for algebra.

Pure and in bounded time; `maths/answer.py` puts the questions to a worker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from prime_lightning.verifiers.maths.scalar import bare, based, choice, number, same_scalar, words
from prime_lightning.verifiers.maths.shape import (
    CLOSE,
    INEQUALITY,
    OPEN,
    SYMBOL,
    Collection,
    collection,
    label,
    solutions,
    split,
    spread,
    variables,
    words_of,
)
from prime_lightning.verifiers.maths.text import LONGEST, normalise
from prime_lightning.verifiers.maths.units import quantity
from prime_lightning.verifiers.options import MathOptions

_MOST_ELEMENTS = 40
_DEEPEST = 30  # brackets within brackets; the parser's time doubles with each few of them
_NUMBER_LABEL = re.compile(r"\\text\{[^{}]*?(?:is|are|=|:) ?\} ?")
_SETS = re.compile(r"<|>|\\le(?![a-z])|\\ge(?![a-z])|\\cup|\\cap|\\setminus|\\mathbb|\\infty|\\begin|\\ne(?![a-z])")
_EQUALS = re.compile(r"(?<![<>\\:]) ?= ?")
_OR = re.compile(r" ?,? ?(?:\\text\{ ?(?:or|and) ?\}|(?<=[\d}) ])(?:or|and)(?=[ \d(\\-])|(?:, ?)(?:or|and) ) ?")


@dataclass(frozen=True, slots=True)
class Question:
    """What a worker must decide: all pairs equal, or (unordered) each reference element equal to one answer element."""

    references: tuple[str, ...]
    answers: tuple[str, ...]
    ordered: bool = True


@lru_cache(maxsize=4096)  # a reference comes with each of its rollouts
def _prepare(text: str) -> str:
    r"""Normalised, `\{` as one character, `1 \text{ or } 2` and `\pm` as lists, inequalities as what they solve to."""
    text = normalise(text).replace(r"\{", "⦃").replace(r"\}", "⦄")
    text = _NUMBER_LABEL.sub("", text, count=1) if text.startswith(r"\text") else text
    return spread(_OR.sub(", ", solutions(text)))


def _unlabel(reference: str, answer: str) -> tuple[str, str] | None:
    """Take labels off, but of lists whose parts have their own; None where both have one and they differ."""
    (wanted_name, wanted), (given_name, given) = (
        ("", text) if len(split(text)) > 1 and sum(map(bool, collection(text).names)) > 1 else label(text)
        for text in (reference, answer)
    )
    if wanted_name and given_name and wanted_name != given_name:
        return None
    return wanted, given


def _same_line(wanted: str, given: str) -> Question | None:
    """The question whether two equations in the same variables are one; None where they are not such."""
    both = wanted.count("=") == given.count("=") == 1 and not INEQUALITY.search(wanted + given)
    letters = variables(wanted)
    return Question((_restore(wanted),), (_restore(given),)) if both and letters == variables(given) else None


def compare(reference: str, answer: str, options: MathOptions) -> bool | Question:
    r"""Whether two answers are the same, or the question that decides it.

    Example:
        >>> compare("1,2", "2, 1", MathOptions()), compare(r"\{1,2\}", "(1,2)", MathOptions())
        (True, False)
        >>> compare(r"\sqrt{8}", r"2\sqrt{2}", MathOptions())
        Question(references=('\\sqrt{8}',), answers=('2\\sqrt{2}',), ordered=True)
    """
    if not answer.strip() or len(answer) > LONGEST:
        return False
    wanted, given = _prepare(reference), _prepare(answer)
    if not given or not _balanced(given):
        return False
    if wanted.replace(" ", "") == given.replace(" ", ""):
        return True
    said = words_of(wanted)
    if said is not None and said == words_of(given):
        return True
    unlabelled = _unlabel(wanted, given)
    if unlabelled is None or ("=" in unlabelled[0]) != ("=" in unlabelled[1]):
        line = _same_line(wanted, given)
        if line is not None or unlabelled is None:
            return line or False
    return _compare(*unlabelled, options)


def self_question(reference: str) -> Question | str:
    r"""What a worker must affirm before a reference can be used: that it equals itself; or why it cannot, or empty.

    Example:
        >>> self_question("42"), self_question(r"\text{(B)}"), self_question(" "), self_question("x^2").references
        ('', '', 'empty', ('x^2',))
    """
    if not reference.strip() or len(reference) > LONGEST:
        return f"longer than {LONGEST} characters" if reference.strip() else "empty"
    text = _prepare(reference)
    if not _balanced(text):
        return "braces do not match"
    text = label(text)[1] if len(split(text)) == 1 else text
    parts = [label(part)[1] for part in collection(text).parts] if collection(text).kind != "interval" else [text]
    parts = [part for part in parts if not _plain(part)]
    values = tuple(_restore(bare(part, MathOptions())) for part in parts)
    return Question(values, values) if values else ""


def _plain(text: str) -> bool:
    """Whether strings and exact numbers decide all about a value."""
    value = quantity(text).value
    known = (number(value), choice(text), words(text), words_of(text), based(text))
    return any(item is not None for item in known) or re.fullmatch(r"\d+ ?: ?\d+", text) is not None


def _balanced(text: str) -> bool:
    """Whether braces match, and nothing is nested deeper than any answer is."""
    depth = braces = 0
    for letter in text:
        depth += (letter in OPEN) - (letter in CLOSE)
        braces += (letter == "{") - (letter == "}")
        if braces < 0 or depth > _DEEPEST:
            return False
    return braces == 0


def _compare(wanted: str, given: str, options: MathOptions) -> bool | Question:
    left, right = collection(wanted), collection(given)
    if left.kind == right.kind == "one":
        return _compare_one(left.parts[0], right.parts[0], options)
    if left.kind == "one" or right.kind == "one":
        return _one_against_many(left, right, wanted, given)
    ordered = _ordered(left, right, options)
    if ordered is None or max(len(left.parts), len(right.parts)) > _MOST_ELEMENTS:
        return False
    wanted_parts, given_parts = _unlabelled_parts(left), _unlabelled_parts(right)
    if left.kind == "set":
        wanted_parts, given_parts = _distinct(wanted_parts), _distinct(given_parts)
    if len(wanted_parts) != len(given_parts):
        return False
    return _in_order(wanted_parts, given_parts, options) if ordered else _any_order(wanted_parts, given_parts, options)


def _one_against_many(left: Collection, right: Collection, wanted: str, given: str) -> bool | Question:
    """An inequality may be an interval, and a one-element set its element; nothing else changes its kind."""
    bounded = [INEQUALITY.search(text) is not None for text in (wanted, given)]
    if sum(bounded) == 1 and (right if bounded[0] else left).kind in ("list", "set"):
        return False
    if _SETS.search(wanted + given):
        return Question((_restore(wanted),), (_restore(given),))
    if {left.kind, right.kind} == {"one", "set"} and len(left.parts) == len(right.parts) == 1:
        return Question(tuple(map(_restore, left.parts)), tuple(map(_restore, right.parts)))
    return False


def _ordered(left: Collection, right: Collection, options: MathOptions) -> bool | None:
    """Whether order counts between two collections; None where their kinds cannot agree."""
    kinds = {left.kind, right.kind}
    if "interval" in kinds:
        return True if left.brackets == right.brackets or (not left.brackets or not right.brackets) else None
    if "set" in kinds:
        return None if "tuple" in kinds else False
    if "tuple" in kinds:
        return True
    named = [all(side.names) and len(set(side.names)) > 1 for side in (left, right)]
    return options.ordered_lists or named[0] != named[1]  # x=2, y=3 is the list 2, 3 in this order


def _unlabelled_parts(whole: Collection) -> list[str]:
    """`x=1, x=2` is the list 1, 2; `x=1, y=2` keeps its names."""
    return [label(part)[1] for part in whole.parts] if len(set(whole.names)) == 1 else list(whole.parts)


def _distinct(parts: list[str]) -> list[str]:
    seen: dict[object, str] = {}
    for part in parts:
        value = number(part)
        seen.setdefault(part.replace(" ", "") if value is None else value, part)
    return list(seen.values())


def _element(wanted: str, given: str, options: MathOptions) -> bool | None:
    """`_compare` of two elements; None where it needs a worker."""
    unlabelled = _unlabel(wanted, given)
    if unlabelled is None:
        return False
    said = _compare(*unlabelled, options)
    return said if isinstance(said, bool) else None


def _in_order(wanted: list[str], given: list[str], options: MathOptions) -> bool | Question:
    said = [_element(a, b, options) for a, b in zip(wanted, given, strict=True)]
    if False in said:
        return False
    open_pairs = [(a, b) for a, b, s in zip(wanted, given, said, strict=True) if s is None]
    if not open_pairs:
        return True
    references, answers = (
        tuple(_restore(bare(text, options)) for text in side) for side in zip(*open_pairs, strict=True)
    )
    return Question(references, answers)


def _any_order(wanted: list[str], given: list[str], options: MathOptions) -> bool | Question:
    """Pair off what agrees for certain; what is left must be paired by a worker, if it can be at all."""
    rest, left = list(given), []
    for text in wanted:
        certain = next((other for other in rest if _element(text, other, options)), None)
        if certain is None:
            left.append(text)
        else:
            rest.remove(certain)
    if not left:
        return True
    if any(all(_element(text, other, options) is False for other in rest) for text in left):
        return False
    references, answers = (tuple(_restore(bare(text, options)) for text in side) for side in (left, rest))
    return Question(references, answers, ordered=len(left) == 1)


def _compare_one(wanted: str, given: str, options: MathOptions) -> bool | Question:
    said = same_scalar(wanted, given, options)
    if said is not None:
        return said
    sides = _EQUALS.split(given)
    if len(sides) > 1 and "=" not in wanted and not re.search(r"<|>|\\le|\\ge", given):
        values = [side for side in sides if not re.fullmatch(SYMBOL, side)]
        return _in_order([wanted] * len(values), values, options) if values and "" not in sides else False
    if ("=" in wanted) != ("=" in given) and not re.search(r"<|>|\\le|\\ge", wanted + given):
        return False
    wanted, given = bare(wanted, options), bare(given, options)
    if number(wanted) is not None and r"\text" in given:
        return False  # words that are no unit: algebra would drop them
    if _only_case_differs(wanted, given):
        return False
    return Question((_restore(wanted),), (_restore(given),))


def _only_case_differs(wanted: str, given: str) -> bool:
    """Whether the variables are the same letters in another case; algebra folds it."""
    left, right = variables(wanted), variables(given)
    return left != right and {letter.lower() for letter in left} == {letter.lower() for letter in right}


def _restore(text: str) -> str:
    return text.replace("⦃", r"\{").replace("⦄", r"\}")
