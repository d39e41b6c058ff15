r"""Shapes of answers: lists, sets, tuples, intervals, unions, names in front, words. Pure string work in bounded time.

It takes normalised text in which ⦃ and ⦄ stand for \{ and \}, and says nothing about values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prime_lightning.verifiers.maths.scalar import number
from prime_lightning.verifiers.maths.units import quantity

OPEN, CLOSE = "([{⦃", ")]}⦄"  # ⦃ ⦄ stand for \{ \}, one character each
_FUNCTIONS = r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|lim|sqrt|frac|text"
_LETTER = rf"(?:[A-Z]{{2,4}}|[A-Za-z]|\\(?!(?:{_FUNCTIONS})(?![a-z]))[a-z]++)"
_SUBSCRIPT = r"(?:_ ?(?:\{ ?\w{1,8} ?\}|\w))?"
_ARGUMENTS = r"(?: ?\( ?-?[A-Za-z\d]{1,4}(?: ?, ?-?[A-Za-z\d]{1,4})* ?\))?"
SYMBOL = rf"(?:{_LETTER}{_SUBSCRIPT}{_ARGUMENTS})"
"""What may name a value: x, x_1, f(2), AB, but no product of small letters."""
_SEGMENT = r"\| ?[A-Z]{2} ?\||\\overline ?\{ ?[A-Z]{2} ?\}|m? ?\\angle ?[A-Z]{1,3}|\\text\{[A-Za-z ]{1,40}\}"
_LABEL = re.compile(
    rf"(?:\\text\{{[^{{}}]*?(?:is|are|=|:) ?\}} ?)?"
    rf"(?:(?P<name>{SYMBOL}(?: ?: ?{SYMBOL})*|{_SEGMENT}|\((?:{SYMBOL}|[, ])++\)) ?(?:=|\\approx|\\in(?![a-z])) ?)?"
)
_BUILDER = re.compile(
    r"⦃ ?(?P<x>[a-z]) ?(?:\\in ?(?:\\mathbb ?)?\{? ?R ?\}? ?)?(?:\||:|\\mid(?![a-z])) ?(?P<condition>[^|:⦃⦄]+)⦄"
)
INEQUALITY = re.compile(r"<|>|\\(?:le|ge|ne)(?![a-z])")
"""A sign of one."""
_LESS, _MORE = r"(<|\\le(?![a-z])) ?", r"(>|\\ge(?![a-z])) ?"
_BETWEEN = re.compile(rf"([^<>=]*?) ?{_LESS}([a-z]) ?{_LESS}([^<>=]*)")
_ONE_SIDED = re.compile(rf"([a-z]) ?(?:{_LESS}|{_MORE})([^<>=]*)")
_EITHER = re.compile(r" ?(?:, ?)?(?:\\text\{ ?or ?\}|(?<![a-z])or(?![a-z])|\\cup|\\vee|\\lor) ?")
_SIGNS = re.compile(r"\\(?:pm|mp)(?![a-z])")
_NOT_WORDS = re.compile(r"[\\{}^_=+*/<>|$()\[\]⦃⦄%&]")
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b")
_MARKS = re.compile(r"(?<!\d)[.,:]|[.,:](?!\d)|-(?!\d)|[^\w\s.,:-]")


@dataclass(frozen=True, slots=True)
class Collection:
    """An answer taken apart at its outermost commas."""

    kind: str
    """`tuple`, `set`, `interval`, `list` (several, no brackets) or `one`."""
    parts: tuple[str, ...]
    brackets: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The name in front of each part."""
        return tuple(label(part)[0] for part in self.parts)


def split(text: str) -> list[str]:
    r"""The parts between commas and semicolons outside all brackets.

    Example:
        >>> split(r"(1,2),\frac{1}{2}; x")
        ['(1,2)', '\\frac{1}{2}', 'x']
    """
    parts, depth, begun = [], 0, 0
    for position, letter in enumerate(text):
        if letter in OPEN:
            depth += 1
        elif letter in CLOSE:
            depth -= 1
        elif letter in ",;" and depth == 0:
            parts.append(text[begun:position].strip())
            begun = position + 1
    return [*parts, text[begun:].strip()]


def _wrapped(text: str) -> bool:
    """Whether the first character's bracket closes with the last."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter in OPEN) - (letter in CLOSE)
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


def label(text: str) -> tuple[str, str]:
    r"""Name and value of `x = 3`, `x \in [0,1]`, `AB = 5`; the name is empty where there is none.

    Example:
        >>> label("x_{1}= 3"), label("2x = 3"), label("S_1:S_2=7:32")
        (('x_1', '3'), ('', '2x = 3'), ('S_1:S_2', '7:32'))
    """
    match = _LABEL.match(text)
    if not match or match.end() in (0, len(text)) or not match["name"]:
        return "", text
    return re.sub(r"[ {}]", "", match["name"]), text[match.end() :].strip()


def solutions(text: str) -> str:
    r"""Inequalities joined by "or" as a union of intervals, and a set that is built by one as the inequality.

    Example:
        >>> solutions("⦃x | -1<x<3⦄"), solutions(r"x<1 \text{ or } 2<x\le3"), solutions("x<1")
        ('-1<x<3', '(-\\infty,1)\\cup(2,3]', 'x<1')
    """
    built = _BUILDER.fullmatch(text)
    if built and INEQUALITY.search(built["condition"]) and variables(built["condition"]) == {built["x"]}:
        text = built["condition"].strip()
    parts = [_interval(part) for part in _EITHER.split(text)] if INEQUALITY.search(text) else []
    if len(parts) < 2 or None in parts or len({part[0] for part in parts if part}) != 1:
        return text
    return r"\cup".join(part[1] for part in parts if part)


def _interval(text: str) -> tuple[str, str] | None:
    """Variable and interval of an inequality; None for anything else."""
    if match := _BETWEEN.fullmatch(text):
        low, first, name, second, high = match.groups()
    elif match := _ONE_SIDED.fullmatch(text):
        name, less, more, bound = match.groups()
        low, high = (r"-\infty", bound) if less else (bound, r"\infty")
        first, second = more or "<", less or "<"
    else:
        return None
    if not low.strip() or not high.strip():
        return None
    return name, f"{'(' if first == '<' else '['}{low},{high}{')' if second == '<' else ']'}"


def variables(text: str) -> set[str]:
    """The letters of an expression that belong to no command."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))


def spread(text: str) -> str:
    r"""A list with both values of everything that is written with plus or minus.

    Example:
        >>> spread(r"⦃1\pm\sqrt{5},-2⦄"), spread(r"\pm 2")
        ('⦃1+\\sqrt{5}, 1-\\sqrt{5}, -2⦄', '2, - 2')
    """
    if not _SIGNS.search(text) or text[:1] == "[":
        return text
    if text[0] == "⦃" and _wrapped(text):
        return f"⦃{spread(text[1:-1])}⦄"
    return ", ".join(sign for part in split(text) for sign in _both_signs(part))


def _both_signs(part: str) -> list[str]:
    if not _SIGNS.search(part):
        return [part]
    both = (part.replace(r"\pm", upper).replace(r"\mp", lower) for upper, lower in ("+-", "-+"))
    return [sign.removeprefix("+").strip() for sign in both]


def words_of(text: str) -> str | None:
    r"""A date, a name or several words with numbers, in one way of writing; None where mathematics stands in it.

    Example:
        >>> words_of(r"\text{May 5th, 2020}"), words_of(r"10 \text{ hours } 30"), words_of("x=2")
        ('may 5 2020', '10 hours 30', None)
    """
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    if _NOT_WORDS.search(text) or not re.search(r"[^\W\d_]{3}", text):
        return None
    return " ".join(_MARKS.sub(" ", _ORDINAL.sub("", text.lower())).split())
