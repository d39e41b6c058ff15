"""A value and what stands around it: currency, percent sign, degree sign, unit. Pure string work.

Leaves out: conversion. 5 cm is not 50 mm here, for a reference in centimetres asks for centimetres.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TEXT_UNIT = re.compile(
    r"(?P<value>.*[^ ]) ?\\text\{ ?(?P<unit>[A-Za-z][A-Za-z ./]{0,40}?)\.? ?\} ?(?P<power>\^ ?\{? ?[23] ?\}?)?"
)
_WORD_UNIT = re.compile(
    r"(?P<value>[-+$]? ?[\d.,/]*\d) ?(?P<unit>[A-Za-z][A-Za-z ./]{1,40}|(?<= )[mgsLNJWVAKF])\.?"
    r"(?P<power>\^ ?\{? ?[23] ?\}?)?"
)
_DEGREE = re.compile(r"(?P<value>.*[^ ]) ?\^\{\\circ\}(?P<unit> ?(?:\\text\{ ?[CF] ?\}|[CF]))?")
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
_NO_UNIT = re.compile(
    r"\b(?:or|and|to|not|no|if|when|unless|plus|minus|times|mod|hundred|thousand|million|billion|trillion|dozen|half"
    r"|halves|percent|squared|cubed|over|by|is|are|e|pi|i|x|y|z|n|k)\b",
    re.IGNORECASE,
)
_UNITS = {
    "dollar": "dollars usd", "cent": "cents ¢", "euro": "euros eur", "pound": "pounds gbp lb lbs",
    "degree": "degrees deg", "m": "meter meters metre metres",
    "cm": "centimeter centimeters centimetre centimetres", "mm": "millimeter millimeters",
    "km": "kilometer kilometers kilometre kilometres", "in": "inch inches", "ft": "foot feet",
    "yd": "yard yards", "mi": "mile miles", "s": "second seconds sec secs", "min": "minute minutes mins",
    "h": "hour hours hr hrs", "day": "days", "week": "weeks", "month": "months", "year": "years yr yrs",
    "g": "gram grams", "kg": "kilogram kilograms", "mg": "milligram milligrams",
    "l": "liter liters litre litres", "ml": "milliliter milliliters", "unit": "units",
}  # fmt: skip
_ALIASES = {alias: unit for unit, aliases in _UNITS.items() for alias in aliases.split()} | {
    "miles per hour": "mph", "square units": "square unit", "sq units": "square unit", "cubic units": "cubic unit",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantity:
    r"""A value with what stands around it.

    Example:
        >>> quantity(r"18\text{ dollars}")
        Quantity(value='18', unit='dollar', percent=False)
    """

    value: str
    unit: str = ""
    percent: bool = False


def _unit_name(unit: str, power: str | None) -> str:
    name = " ".join(unit.lower().replace(".", " ").split())
    name = _ALIASES.get(name, name)
    for word, exponent in (("square ", "2"), ("sq ", "2"), ("cubic ", "3")):
        if name.startswith(word) and not name.endswith(" unit"):
            name, power = _ALIASES.get(name.removeprefix(word), name.removeprefix(word)), exponent
    exponent = (power or "").strip("^{} ")
    return f"{name}^{exponent}" if exponent else name


def quantity(text: str) -> Quantity:
    """Take currency, percent sign, degree sign or unit off a value."""
    unit, percent = "", False
    if text[:1] in _CURRENCY or text[:2] in ("-$", "-€", "-£"):
        sign = "-" if text[0] == "-" else ""
        unit, text = _CURRENCY[text[len(sign)]], sign + text[len(sign) + 1 :].strip()
    stripped = re.sub(r" ?(?:%|\\text\{ ?(?:percent|pct) ?\}|(?<=\d) (?:percent|pct))$", "", text)
    if stripped != text:
        percent, text = True, stripped.strip()
    elif match := _DEGREE.fullmatch(text):
        text, unit = match["value"], "degree" + re.sub(r"\\text|[{} ]", "", match["unit"] or "").lower()
    elif (match := _TEXT_UNIT.fullmatch(text) or _WORD_UNIT.fullmatch(text)) and not _NO_UNIT.search(match["unit"]):
        text, unit = match["value"].strip(), _unit_name(match["unit"], match["power"])
    return Quantity(text, unit, percent)
