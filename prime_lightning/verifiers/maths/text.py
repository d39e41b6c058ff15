"""From a completion to its boxed answer, and from any way of writing to one: pure string work in linear time.

Protects: hostile text costs time in proportion to its length, and answers over 1,000 characters are not looked at.
Leaves out: mathematics. Two spellings of one value may normalise differently; `maths/compare.py` goes on from here.
"""
# ruff: noqa: RUF001

from __future__ import annotations

import re
import unicodedata

LONGEST = 1000
"""Characters of an answer that is still graded."""
_WINDOW = 4 * LONGEST  # how far before the last box others are looked for, and how far after its start its end

_MOST_BOXES = 32
_LONGEST_JOINT = 120  # characters between two boxes of a list

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[-+]?\d[\d.,]*(?<![.,])|[A-Za-z]")
_MINUS = re.compile(r"(?:=|\$|\\[(\[])\s*-\s*$")  # of the value in the box behind it
_LAYOUT = re.compile(r"\\(?:[()\[\],;:! ]|quad|qquad)|\\text(?:rm|bf)?\s*\{|[$}*~]")
_NAME = r"(?:\\?[A-Za-z]{1,8}(?:_\{?\w{1,4}\}?)? ?= ?)?"
_LIST = re.compile(rf"(?:[,;] ?|(?:[,;] ?)?(?:[a-z]+ ){{0,3}}(?:and|or|&) ?(?:[a-z]+ ){{0,9}}){_NAME}", re.IGNORECASE)
_CORRECTS = re.compile(
    r"\b(?:but|not?|wait|actually|instead|rather|however|correct\w*|answer|wrong|so|thus|hence|therefore|then|final\w*|gives"
    r"|check\w*|again)\b",
    re.IGNORECASE,
)


def _box_at(text: str, end: int) -> tuple[str | None, int]:
    """Content of the box whose command ends at `end`; None if it is empty, or not closed in the window."""
    if end >= len(text) or text[end] != "{":
        bare = _BARE.match(text, end, end + 40)
        return (bare.group(), bare.end()) if bare else (None, end)
    depth, position = 0, end
    while position < min(len(text), end + _WINDOW):
        letter = text[position]
        if letter == "\\":
            position += 1  # \{ and \} are no braces
        elif letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
            if depth == 0:
                return text[end + 1 : position].strip() or None, position + 1
        position += 1
    return None, len(text)


def _listed(between: str) -> bool:
    """Whether what stands between two boxes makes a list of them."""
    if len(between) > _LONGEST_JOINT:
        return False
    words = " ".join(_LAYOUT.sub(" ", between).split()) + " "
    return bool(_LIST.fullmatch(words.lstrip())) and not _CORRECTS.search(words)


def boxes(text: str) -> list[str]:
    r"""The last boxed answer, with those that a comma or a word joins to it; empty where none counts.

    The last box decides: if it is not closed or empty, nothing counts. A box inside a box is part of the outer one.
    "3 or 4" is a list; "3, but ... 4" is a correction, and 4 counts. A minus sign in front of a box belongs to it.

    Example:
        >>> boxes(r"First \boxed{3}. So the answer is \boxed{\frac{1}{2}}.")
        ['\\frac{1}{2}']
        >>> boxes(r"It is \boxed{3} or \boxed{4}"), boxes(r"so \boxed{3")
        (['3', '4'], [])
    """
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if last < 0:
        return []
    text = text[max(0, last - _WINDOW) :]
    commands = list(_BOX.finditer(text))[-_MOST_BOXES:]
    found = [(match.start(), *_box_at(text, match.end())) for match in commands]
    if not found or found[-1][1] is None:
        return []
    outer: list[tuple[int, str, int]] = []
    for start, content, end in found:
        if content is not None and (not outer or start >= outer[-1][2]):
            sign = "-" if _MINUS.search(text, max(0, start - 9), start) else ""
            outer.append((start, sign + content, end))
    chosen = [outer.pop()]
    while outer and _listed(text[outer[-1][2] : chosen[0][0]]):
        chosen.insert(0, outer.pop())
    return [content for _, content, _ in chosen]


# ---- one way of writing ------------------------------------------------------------------------------------------

_INVISIBLE = dict.fromkeys(
    map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
)
_FORMULAS = re.compile(r"(?<!\\)\$((?:\\\$|[^$])*)(?<!\\)\$")
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
_RAISED = str.maketrans(_SUPERSCRIPTS, "0123456789-+n")
_LOWERED = str.maketrans(_SUBSCRIPTS, "0123456789")
_VULGAR = {ord(c): r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", c).split("⁄")) for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}  # noqa: UP031 (braces)
_SYMBOLS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "÷": "/", "⁄": "/",
        "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
        "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "°": r"^{\circ}", "±": r"\pm ", "∅": r"\emptyset ",
        "ø": r"\emptyset ", "∈": r"\in ", "→": r"\to ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
        "≈": r"\approx ", "‘": "'", "’": "'", "“": '"', "”": '"', "′": "'",
    }
)  # fmt: skip
_WORDS = (
    (re.compile(r",\\! ?(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\(?:begin|end)\{(?:align(?:ed)?|equation|gather(?:ed)?|split|math|displaymath)\*?\}"), ""),
    (re.compile(r"^\s*\$?\s*(?:\\(?:approx|sim)(?![A-Za-z]))"), ""),
    (re.compile(r"\\log_ ?(?:\{ ?e ?\}|e)"), r"\\ln "),
    (re.compile(r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(
        r"\\(?:displaystyle|textstyle|left|right|bigl?|bigr|Bigl?|Bigr"
        r"|limits|middle|quad|qquad|!|boxed|fbox)(?![A-Za-z])\.?"
    ), ""),
    (re.compile(
        r"\\(?:textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf"
        r"|mbox|hbox|boldsymbol|bm|operatorname)(?![A-Za-z])\s*\{"
    ), r"\\text{"),
    (re.compile(r"\\text\{([^{}A-Za-z]*)\}"), r"\1"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])|(?<=\s)!="), r"\\ne "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"\\(?:varnothing)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:langle|lparen)(?![A-Za-z])"), "("),
    (re.compile(r"\\(?:rangle|rparen)(?![A-Za-z])"), ")"),
    (re.compile(r"\\(?:degree|degrees)(?![A-Za-z])|\^\s*\\circ(?![A-Za-z])"), r"^{\\circ}"),
    (re.compile(r"\\(?:percent)(?![A-Za-z])|\\%"), "%"),
    (re.compile(r"\\(?:dollar)(?![A-Za-z])|\\\$"), "$"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\{([,:])\}"), r"\1"),
    (re.compile(r"(?<!\\)\\(?=\d)"), ""),
    (re.compile(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\\\\s*$"), " "),
    (re.compile(r"\\[()\[\]]"), ""),
    (re.compile(r"√\s*(\d+|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), r"^{\\circ}"),
    (re.compile(r"(?<![A-Za-z\\])(sqrt)\s*\(([^()]*)\)"), r"\\sqrt{\2}"),
    (re.compile(r"(?<![A-Za-z\\])(pi|infinity|infty)(?![A-Za-z])"), lambda m: r"\pi " if m[1] == "pi" else r"\infty "),
    (re.compile(r"\s+"), " "),
)  # fmt: skip


def normalise(text: str) -> str:
    r"""One way of writing an answer, as LaTeX without layout.

    Example:
        >>> normalise(r"$\displaystyle\dfrac{1}{2}$ "), normalise("x²"), normalise(r"12\,345"), normalise("½.")
        ('\\frac{1}{2}', 'x^{2}', '12345', '\\frac{1}{2}')
    """
    text = _FORMULAS.sub(r"\1", text.translate(_INVISIBLE)).translate(_VULGAR)
    # Before NFKC, which would turn x² into x2.
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda m: "^{" + m[0].translate(_RAISED) + "}", text)
    text = re.sub(f"[{_SUBSCRIPTS}]+", lambda m: "_{" + m[0].translate(_LOWERED) + "}", text)
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    for pattern, replacement in _WORDS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$").strip()
    text = text.removesuffix("$").strip() if text.count("$") == 1 else text
    if text.endswith((".", ",", ";")) and not text.endswith(".."):
        text = text[:-1].rstrip()
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):
        text = text.replace(" ", "")
    return text
