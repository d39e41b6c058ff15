r"""Where a completion says its answer: behind its reasoning, and outside a box. Pure string work in linear time.

Only the last characters of a completion are looked at, so hostile text costs no more than honest text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from prime_lightning.verifiers.maths.text import LONGEST

_WINDOW = 4 * LONGEST
_LAST_LINES = 3
_STATED = re.compile(
    r"\banswers?\b[^\n.:=$\\]{0,60}?(?:\b(?:is|are)\b|[:=])[ \t:]*"  # the (final) answer (to this question) is X
    r"|\*\*(?:the )?(?:final )?answer:?\*\*:?[ \t]*"  # **Answer** X
    r"|^[ \t#*]*(?:final )?answer\b:?[ \t*]*"  # a line or a heading that begins so
    r"|^[ \t]*A:[ \t]*|####[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_GAP = re.compile(r"[ \t*:\n]*")
_LINE = re.compile(r"\\\[.{1,400}?\\\]|\$\$[^$]{1,400}\$\$|[^\n]+", re.DOTALL)
_TAGGED = re.compile(r"<answer>\s*([^<]{1,300}?)\s*</answer>\s*$", re.IGNORECASE)
_BOLD_END = re.compile(r"\*\*([^*\n]{1,200})\*\*[\s.]*$")
_HOPE = re.compile(r"[\s.]*I hope\b.*", re.IGNORECASE)
_PIECE = re.compile(
    r"\*\*([^*\n]{1,200})\*\*|\$\$([^$]{1,400})\$\$|(?<![\\\d])\$((?:\\\$|[^$\n]){1,400}?)\$"
    r"|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"[.!?]['\")]*(?=\s|$)")
_HARMLESS = re.compile(
    r"(?:\s|:|≈|\b(?:the|an?|that|then|equals?|to|simply|just|therefore|thus|so|given|by|as|follows|approximately|about"
    r"|exactly|is|are|value|values|of|number|numbers|we|have|get|it|its|be|found|[a-z] =)\b)*",
    re.IGNORECASE,
)
_JOIN = re.compile(r"(?:\s*(?:,|;|&|\band\b|\bor\b|\bas well as\b))+\s*", re.IGNORECASE)
_OR = re.compile(r"\bor\b", re.IGNORECASE)
_ASIDE = re.compile(r"\s*[,;:(]|\s+(?:because|since|when|where|which|as|for|with|so|by|after|in|on|of|at|if)\b")
_UNIT = re.compile(r"\s*([A-Za-z][A-Za-z ./]{0,60})\s*")


def after_reasoning(text: str, tags: Sequence[str]) -> str | None:
    """What stands behind the last reasoning block; None where one is not closed.

    A closing tag without an opening one counts, for chat templates open the block in the prompt.

    Args:
        text: A completion.
        tags: Opening and closing tag of a kind of block, with a space between.

    Example:
        >>> tags = ["<think> </think>"]
        >>> after_reasoning("<think>3?</think>It is 4", tags), after_reasoning("<think>3", tags)
        ('It is 4', None)
    """
    for pair in tags:
        opening, closing = pair.split()
        end = text.rfind(closing)
        if end >= 0:
            text = text[end + len(closing) :]
        if opening in text:
            return None
    return text


def stated(text: str) -> str | None:
    r"""What a completion without a box says that its answer is; None where it says no such thing.

    The last of: "answer is X", "Answer: X", `#### X`, `A: X`, `<answer>X</answer>`, and `**X**` at the end.

    Example:
        >>> stated("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct."), stated("#### 1,200")
        ('\\frac{1}{2}', '1,200')
        >>> stated("So she pays **18 dollars**."), stated("The answer is $3$ or $4$."), stated("She pays 18.")
        ('18 dollars', '3 or 4', None)
    """
    text = text.rstrip()[-_WINDOW:]
    tagged = _TAGGED.search(text)
    if tagged:
        return _said(tagged[1])
    line, end = _last_statement(text)
    said = _said(line)
    bold = _BOLD_END.search(text)
    return _said(bold[1]) if bold and (said is None or bold.start() >= end) else said


def _last_statement(text: str) -> tuple[str, int]:
    """The rest of the line behind the last words that announce an answer, and where it ends.

    Where nothing is behind them, it is the next line that is not empty; a displayed formula is taken as a whole.
    """
    for match in reversed(list(_STATED.finditer(text))):
        begin = _GAP.match(text, match.end()).end()  # type: ignore[union-attr]
        line = _LINE.match(text, begin)
        if line:
            return line[0], line.end()
    return "", 0


def _said(text: str) -> str | None:
    """The answer in the rest of a sentence: formulas or bold words joined as a list, with the unit behind them.

    None where there is nothing, or a formula in a sentence that says more than what the answer is.
    """
    text = _HOPE.sub("", text).strip()
    pieces = list(_PIECE.finditer(text))
    sentence = next((m.start() for m in _SENTENCE_END.finditer(text) if not _inside(pieces, m.start())), len(text))
    text = text[:sentence].strip()
    pieces = [piece for piece in pieces if piece.end() <= sentence]
    if not pieces:
        return text.replace("**", "").strip() or None
    return "".join(_joined(text, pieces)).strip() if _HARMLESS.fullmatch(text, 0, pieces[0].start()) else None


def _joined(text: str, pieces: list[re.Match[str]]) -> Iterator[str]:
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        yield next(group for group in piece.groups() if group is not None).strip()
        gap = text[piece.end() : following.start() if following else len(text)]
        if following is None:
            unit = _UNIT.fullmatch(gap)
            yield rf"\text{{ {unit[1].strip()}}}" if unit else "" if _ASIDE.match(gap) else gap
        elif _JOIN.fullmatch(gap) or _OR.search(gap):
            yield " or " if _OR.search(gap) else ", "
        elif _ASIDE.match(gap):
            return
        else:
            yield gap


def _inside(pieces: list[re.Match[str]], position: int) -> bool:
    return any(piece.start() < position < piece.end() for piece in pieces)


def last_lines(text: str) -> str:
    r"""The lines of a completion in which an answer is looked for when it states none.

    Example:
        >>> last_lines("a\n\nb\n\nc\nd\n")
        'b\nc\nd'
    """
    lines = [line for line in text[-LONGEST:].splitlines() if line.strip()]
    return "\n".join(lines[-_LAST_LINES:])
