"""One value against one value, as far as exact arithmetic on strings goes: numbers, units, percent, bases, words.

Three answers: True, False, or None for "this needs algebra". Everything is bounded by the length of an answer.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from prime_lightning.verifiers.maths.units import Quantity, quantity
from prime_lightning.verifiers.options import MathOptions

_PLAIN = re.compile(r"([-+]?) ?(?:(\d{1,3}(?:,\d{3})+|\d+)(\.\d*)?|(\.\d+))(?:[eE]([-+]?\d{1,3}))?")
_POWER_OF_TEN = re.compile(
    r"(?:(?P<head>[-+]?[\d.,]+) ?(?:\\times|\\cdot|\*) ?)?10 ?\^ ?(?:\{ ?(?P<braced>[-+]?\d{1,3}) ?\}|(?P<digit>\d))"
)
_FRACTION = re.compile(r"(?P<sign>[-+]?) ?\\frac ?\{(?P<top>[^{}]*)\} ?\{(?P<bottom>[^{}]*)\}")
_SLASHED = re.compile(r"\(?(?P<top>[-+]?[\d.,]+)\)? ?/ ?\(?(?P<bottom>[\d.,]+)\)?")
_MIXED = re.compile(
    r"(?P<sign>[-+]?) ?(?P<whole>\d+)(?: ?\\frac ?\{(?P<top>\d+)\} ?\{(?P<bottom>\d+)\}| (?P<up>\d+) ?/ ?(?P<low>\d+))"
)
_SCALED = re.compile(r"(?P<head>.*\d) ?(?:\\text\{ ?)?(?P<word>hundred|thousand|million|billion|trillion|dozen)s? ?\}?")
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_BASED = re.compile(
    r"(?P<sign>-?)(?P<digits>[0-9A-Z]{1,60})_ ?"
    r"(?:\{ ?(?P<braced>\d{1,2}) ?\}|(?P<digit>\d)|\{? ?\\text\{ ?(?P<word>[a-z]+) ?\} ?\}?)"
)
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12,
    "sixteen": 16,
}  # fmt: skip

_CHOICE = re.compile(r"\(?(?:\\text\{ ?\(?(?P<wrapped>[A-Z])\)?[.:]? ?\}|(?P<plain>[A-Z]))\)?[.:]?")
_CHOICE_AND_VALUE = re.compile(
    r"(?:\\text\{ ?\(?(?P<wrapped>[A-Z])[).:]{1,2}(?: [^{}]*)?\}|\((?P<paren>[A-Z])\)|(?P<plain>[A-Z])[).:] ).*"
)
_TEXT = re.compile(r"(?:\\text\{(?P<wrapped>[^{}\\]*)\}|(?P<plain>[A-Za-z][A-Za-z' -]{2,}|[Nn]o))\.?")


def _short(digits: str) -> str:
    return digits.replace(",", "")


def _plain(text: str) -> Fraction | None:
    match = _PLAIN.fullmatch(text)
    if not match:
        return None
    sign, whole, decimals, only_decimals, exponent = match.groups()
    digits = _short(whole or "0") + (decimals or only_decimals or "")
    return Fraction(f"{sign}{digits.rstrip('.')}") * Fraction(10) ** int(exponent or 0)


def _ratio(top: str, bottom: str) -> Fraction | None:
    above, below = _plain(top.strip()), _plain(bottom.strip())
    return None if above is None or not below else above / below


def number(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, power of ten, fraction or mixed number; None for anything else.

    Example:
        >>> number("1,234"), number(r"2\frac{1}{3}"), number("-1/4"), number("1e-3"), number("x")
        (Fraction(1234, 1), Fraction(7, 3), Fraction(-1, 4), Fraction(1, 1000), None)
    """
    value = _plain(text)
    if value is not None:
        return value
    if match := _POWER_OF_TEN.fullmatch(text):
        head = _plain(match["head"] or "1")
        return None if head is None else head * Fraction(10) ** int(match["braced"] or match["digit"])
    if match := _SCALED.fullmatch(text):
        head = _plain(match["head"])
        return None if head is None else head * _SCALES[match["word"]]
    if match := _MIXED.fullmatch(text):
        part = _ratio(match["top"] or match["up"], match["bottom"] or match["low"])
        whole = None if part is None else int(match["whole"]) + part
    elif match := _FRACTION.fullmatch(text):
        whole = _ratio(match["top"], match["bottom"])
    elif match := _SLASHED.fullmatch(text):
        return _ratio(match["top"], match["bottom"])
    else:
        return None
    return -whole if whole is not None and match["sign"] == "-" else whole


def based(text: str) -> tuple[str, int] | None:
    """Digits and base of a numeral such as `101_2`; None for anything else."""
    match = _BASED.fullmatch(text)
    if not match:
        return None
    base = _BASES.get(match["word"], 0) if match["word"] else int(match["braced"] or match["digit"])
    usable = 2 <= base <= 36 and all(int(digit, 36) < base for digit in match["digits"])
    return (match["sign"] + (match["digits"].lstrip("0") or "0"), base) if usable else None


def _same_number(reference: str, answer: str, options: MathOptions) -> bool | None:
    wanted, given = number(reference), number(answer)
    if wanted is None or given is None:
        return None
    if wanted == given:
        return True
    # A decimal for 1/3 cannot be exact; a decimal for 1/2, or for another decimal, can.
    one_decimal = _is_decimal(reference) != _is_decimal(answer)
    endless = (given if _is_decimal(reference) else wanted).denominator
    if not one_decimal or not options.tolerance or _finite_decimal(endless):
        return False
    allowed = max(abs(wanted), abs(given)) * Fraction(str(options.tolerance))
    if _is_decimal(reference):  # it was rounded at its last digit, no coarser
        allowed = min(allowed, Fraction(1, 10 ** len(reference.rpartition(".")[2])))
    return abs(wanted - given) <= allowed


def _is_decimal(text: str) -> bool:
    return "." in text and "frac" not in text and "/" not in text


def _finite_decimal(denominator: int) -> bool:
    for factor in (2, 5):
        while denominator % factor == 0:
            denominator //= factor
    return denominator == 1


def _same_based(reference: str, answer: str, options: MathOptions) -> bool | None:
    wanted, given = based(reference), based(answer)
    if wanted is None and given is None:
        return None
    if options.bases == "ignore":
        wanted_digits = wanted[0] if wanted else reference
        return wanted_digits == (given[0] if given else answer)
    if wanted is not None:
        return given == wanted
    value = number(reference)
    return value is not None and given is not None and value == int(given[0], given[1])


def choice(text: str) -> str | None:
    r"""The letter of a multiple-choice answer: `B`, `(B)`, `\text{B.}`; None for anything else."""
    match = _CHOICE.fullmatch(text)
    return (match["wrapped"] or match["plain"]) if match else None


def words(text: str) -> str | None:
    """An answer in words, in lower case with single spaces; None where it is none."""
    match = _TEXT.fullmatch(text)
    if not match:
        return None
    said = " ".join(
        re.sub(r"[^\w\s]", " ", match["wrapped"] if match["wrapped"] is not None else match["plain"]).lower().split()
    )
    return re.sub(r"^(?:the|an?) (?=\w{3})", "", said) or None


def _same_words(reference: str, answer: str) -> bool | None:
    letter = choice(reference)
    if letter is not None:
        if choice(answer) == letter:
            return True
        match = _CHOICE_AND_VALUE.fullmatch(answer)
        if match:
            return (match["wrapped"] or match["paren"] or match["plain"]) == letter
        return False if choice(answer) else None
    wanted, given = words(reference), words(answer)
    if wanted is not None and given is not None:
        return wanted == given
    return None


def same_scalar(reference: str, answer: str, options: MathOptions) -> bool | None:
    r"""Whether two normalised values agree; None where only algebra can say.

    Example:
        >>> same_scalar("18", r"18\text{ dollars}", MathOptions()), same_scalar(r"5\text{ cm}", "5 m", MathOptions())
        (True, False)
        >>> same_scalar("50", "0.5", MathOptions()), same_scalar(r"\pi", "3.14", MathOptions())
        (False, None)
    """
    if reference.replace(" ", "") == answer.replace(" ", ""):
        return True
    said = _same_based(reference, answer, options)
    if said is None:
        said = _same_words(reference, answer)
    if said is not None:
        return said
    wanted, given = quantity(reference), quantity(answer)
    if not _units_agree(wanted, given, options):
        return False
    if (wanted.percent and given.unit) or (given.percent and wanted.unit):
        return False
    if wanted.percent or given.percent:
        return _same_percent(wanted, given, options)
    if wanted.value.replace(" ", "") == given.value.replace(" ", ""):
        return True
    return _same_number(wanted.value, given.value, options)


def _units_agree(wanted: Quantity, given: Quantity, options: MathOptions) -> bool:
    if wanted.unit == given.unit:
        return True
    return options.units == "lenient" and not (wanted.unit and given.unit)


def _same_percent(wanted: Quantity, given: Quantity, options: MathOptions) -> bool | None:
    """A written percent sign against none: 50% is 50 (lenient) and 0.5 (always)."""
    if wanted.percent and given.percent:
        return _same_number(wanted.value, given.value, options)
    if options.percent == "lenient" and _same_number(wanted.value, given.value, options):
        return True
    hundredths = number(wanted.value if wanted.percent else given.value)
    plain = number(given.value if wanted.percent else wanted.value)
    if hundredths is None or plain is None:
        return None
    return hundredths / 100 == plain


def bare(text: str, options: MathOptions) -> str:
    """The value without unit, currency and percent sign, for the algebra that follows a None of `same_scalar`."""
    taken = quantity(text)
    if taken.percent and options.percent == "strict":
        taken = replace(taken, value=rf"\frac{{{taken.value}}}{{100}}")
    return taken.value or text
