"""Reference against answer: structure first (lists, sets, intervals, labels), then values, then a question for algebra.

Pure and in bounded time; `math_answer.py` puts the questions to a worker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prime_lightning.verifiers.math_scalar import bare, based, choice, number, same_scalar, words
from prime_lightning.verifiers.math_text import LONGEST, normalise
from prime_lightning.verifiers.math_units import quantity
from prime_lightning.verifiers.options import MathOptions

_MOST_ELEMENTS = 40
_DEEPEST = 30  # brackets within brackets; the parser's time doubles with each few of them
_OPEN, _CLOSE = "([{⦃", ")]}⦄"  # ⦃ ⦄ stand for \{ \}, one character each
_SYMBOL = r"(?:[A-Za-z]|\\[a-z]++)(?:_ ?(?:\{ ?\w{1,8} ?\}|\w))?(?: ?\( ?[a-z](?: ?, ?[a-z])* ?\))?"
_LABEL = re.compile(
    rf"(?:\\text\{{[^{{}}]*?(?:is|are|=|:) ?\}} ?)?"
    rf"(?:(?P<name>{_SYMBOL}|\((?:{_SYMBOL}|[, ])++\)) ?(?:=|\\in(?![a-z])) ?)?"
)
_NUMBER_LABEL = re.compile(r"\\text\{[^{}]*?(?:is|are|=|:) ?\} ?")
_EQUALS = re.compile(r"(?<![<>!\\:]) ?= ?")
_OR = re.compile(r" ?,? ?(?:\\text\{ ?(?:or|and) ?\}|(?<=[\d}) ])(?:or|and)(?=[ \d(\\-])|(?:, ?)(?:or|and) ) ?")


@dataclass(frozen=True, slots=True)
class Question:
    """What a worker must decide: all pairs equal, or (unordered) each reference element equal to one answer element."""

    references: tuple[str, ...]
    answers: tuple[str, ...]
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Collection:
    """An answer taken apart at its outermost commas."""

    kind: str
    """`tuple`, `set`, `interval`, `list` (several, no brackets) or `one`."""
    parts: tuple[str, ...]
    brackets: str = ""


def split(text: str) -> list[str]:
    r"""The parts between commas and semicolons outside all brackets.

    Example:
        >>> split(r"(1,2),\frac{1}{2}; x")
        ['(1,2)', '\\frac{1}{2}', 'x']
    """
    parts, depth, begun = [], 0, 0
    for position, letter in enumerate(text):
        if letter in _OPEN:
            depth += 1
        elif letter in _CLOSE:
            depth -= 1
        elif letter in ",;" and depth == 0:
            parts.append(text[begun:position].strip())
            begun = position + 1
    return [*parts, text[begun:].strip()]


def _wrapped(text: str) -> bool:
    """Whether the first character's bracket closes with the last."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if depth == 0:
            return position == len(text) - 1 and position > 0
    return False


def collection(text: str) -> Collection:
    r"""Take an answer apart.

    Example:
        >>> collection("(1,2)").kind, collection("1, 2").kind, collection("1,234").kind, collection("[0,1)").kind
        ('tuple', 'list', 'one', 'interval')
    """
    if number(quantity(text).value) is not None:
        return Collection("one", (text,))
    if len(text) > 1 and _wrapped(text):
        inner = split(text[1:-1])
        brackets = text[0] + text[-1]
        if brackets == "⦃⦄" and "|" not in text and ":" not in text:
            return Collection("set", tuple(inner) if inner != [""] else (), brackets)
        if len(inner) == 2 and brackets in ("[]", "[)", "(]"):
            return Collection("interval", tuple(inner), brackets)
        if len(inner) > 1 and brackets in ("()", "[]"):
            return Collection("tuple", tuple(inner), brackets)
        if len(inner) == 1 and brackets == "()":
            return collection(text[1:-1].strip())
    outer = split(text)
    return Collection("list", tuple(outer)) if len(outer) > 1 else Collection("one", (text,))


def _prepare(text: str) -> str:
    r"""Normalised, `\{` as one character, `1 \text{ or } 2` and `\pm` as lists."""
    text = normalise(text).replace(r"\{", "⦃").replace(r"\}", "⦄")
    text = _NUMBER_LABEL.sub("", text, count=1) if text.startswith(r"\text") else text
    text = _OR.sub(", ", text)
    if r"\pm" in text and len(split(text)) == 1 and text[:1] not in "⦃([":
        both = (text.replace(r"\pm", upper).replace(r"\mp", lower) for upper, lower in ("+-", "-+"))
        text = ", ".join(sign.removeprefix("+").strip() for sign in both)
    return text


def _label(text: str) -> tuple[str, str]:
    r"""Name and value of `x = 3`, `x \in [0,1]`, `f(x) = x^2`; the name is empty where there is none."""
    match = _LABEL.match(text)
    if not match or match.end() in (0, len(text)) or not match["name"]:
        return "", text
    return match["name"].replace(" ", ""), text[match.end() :].strip()


def _unlabel(reference: str, answer: str) -> tuple[str, str] | None:
    """Take labels off; None where both have one and they differ."""
    (wanted_name, wanted), (given_name, given) = _label(reference), _label(answer)
    if wanted_name and given_name and wanted_name != given_name:
        return None
    return wanted, given


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
    unlabelled = _unlabel(wanted, given)
    if unlabelled is None:
        return False
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
    text = _label(text)[1]
    parts = [_label(part)[1] for part in collection(text).parts] if collection(text).kind != "interval" else [text]
    parts = [part for part in parts if not _plain(part)]
    values = tuple(_restore(bare(part, MathOptions())) for part in parts)
    return Question(values, values) if values else ""


def _plain(text: str) -> bool:
    """Whether strings and exact numbers decide all about a value."""
    value = quantity(text).value
    known = (number(value), choice(text), words(text), based(text))
    return any(item is not None for item in known) or re.fullmatch(r"\d+ ?: ?\d+", text) is not None


def _balanced(text: str) -> bool:
    """Whether braces match, and nothing is nested deeper than any answer is."""
    depth = braces = 0
    for letter in text:
        depth += (letter in _OPEN) - (letter in _CLOSE)
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
    if re.search(
        r"<|>|\\le(?![a-z])|\\ge(?![a-z])|\\cup|\\cap|\\setminus|\\mathbb|\\infty|\\begin|\\ne(?![a-z])", wanted + given
    ):
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
    return options.ordered_lists


def _unlabelled_parts(whole: Collection) -> list[str]:
    """`x=1, x=2` is the list 1, 2; `x=1, y=2` keeps its names."""
    labelled = [_label(part) for part in whole.parts]
    if len({name for name, _ in labelled}) == 1:
        return [value for _, value in labelled]
    return list(whole.parts)


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
        values = [side for side in sides if not re.fullmatch(_SYMBOL, side)]
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
    left, right = (set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))) for text in (wanted, given))
    return left != right and {letter.lower() for letter in left} == {letter.lower() for letter in right}


def _restore(text: str) -> str:
    return text.replace("⦃", r"\{").replace("⦄", r"\}")
