r"""What a data set calls an answer -> the reference text that graders read; and which references nobody could meet.

The contract between data and graders: a reference is one text. A list of answers means all of them, in any order, and
reaches the grader as its elements joined by `, `, without their dollars; a list inside a list, like anything that is
written in round brackets, is a tuple, whose order counts. A mapping is no answer: one of its fields is.

References are checked once, when a data set is loaded, with the graders that will use them. Usable is a reference that
a model could meet by writing the answer it stands for. That a text equals itself says little: a whole solution does so,
too, and no answer equals it.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from prime_lightning.rollout import Label, Verdict
from prime_lightning.verifiers.maths.answer import MathGrader
from prime_lightning.verifiers.maths.text import boxes

GSM8K = r"'####\s*(.+)'"
"""The `answer_pattern` of GSM8K."""
BOXED = "`answer_pattern: boxed` reads the last box in it"
PATTERN = "an `answer_pattern` with one group reads the answer in it"
MOST_WORDS = 20
"""Words of an answer that a model may still be expected to write word for word."""
_NO_ANSWERS = frozenset(
    [
        *("proof", "prove", "notfound", "not_found", "not found", "answer not found", "no answer", "unanswered"),
        *("nan", "null", "none", "nil", "na", "n/a", "not available", "not applicable", "see solution", "tbd", "todo"),
        *("empty", "missing", "unknown", "undetermined"),
    ]
)
_ARE_ANSWERS = frozenset({"none", "empty", "unknown", "undetermined", "missing", "na"})
"""These may be answers when written with a small letter: "which of them? none"."""
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?:\.\d+)?")
_DOLLARS = re.compile(r"\$\$?([^$]*)\$?\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_THOUGHT = re.compile(r"</?(?:think|thinking|reasoning|answer|solution)>", re.IGNORECASE)
_SAYS = re.compile(r"(?:\banswers?\b\s*(?:is|are|:|=)|^\s*A:\s)", re.IGNORECASE | re.MULTILINE)
_ARGUES = re.compile(
    r"\b(?:since|thus|therefore|hence|because|we (?:get|have|obtain|find|see)|it follows)\b|\\\\\s*&\s*=", re.IGNORECASE
)
_CHAIN = re.compile(r"=[^=,;]*\d *[-+*/^\\][^=,;]*=")
_WRAPPED = re.compile(r"\\(?:boxed|fbox|text(?:bf|it|rm)?|mathrm|mbox)(?![A-Za-z])")
_PROSE = re.compile(r"\\[A-Za-z]+|[A-Za-z]{2,}")


def reference_text(value: Any) -> str:
    r"""The reference that a value of a data set stands for.

    Numbers keep their digits. Text that is JSON, or Python's text, of a list of strings or a mapping is read as such.

    Raises:
        ValueError: for null, nothing, or a mapping; the message says what it is, and what reads it.

    Example:
        >>> reference_text(["$5$", "1,234"]), reference_text([[1, 2], [3, 4]]), reference_text('["7"]')
        ('5, 1234', '(1, 2), (3, 4)', '7')
    """
    value = structure(value)
    if isinstance(value, Mapping):
        raise ValueError(f"a mapping with the fields {sorted(map(str, value))}, {_field_of(value)}")
    if isinstance(value, list):
        if not value:
            raise ValueError("an empty list")
        return ", ".join(_elements(value))
    text = _scalar(value)
    if not text.strip():
        raise ValueError("nothing" if value is None else "empty text")
    return text


def structure(value: Any) -> Any:
    """A list or mapping where the value is one, or the text of one; a list of bare numbers in a text stays a text.

    Example:
        >>> structure("{'target': 24}"), structure('["x"]'), structure("[1, 2]"), structure(r"{x}")
        ({'target': 24}, ['x'], '[1, 2]', '{x}')
    """
    if isinstance(value, str):
        read = _read(value.strip())
        if isinstance(read, Mapping) and read:
            return read
        texts = isinstance(read, list) and all(isinstance(part, str | Mapping) for part in read)
        return read if texts else value
    if isinstance(value, tuple) or hasattr(value, "tolist"):
        return list(value) if isinstance(value, tuple) else value.tolist()
    return value


def _read(text: str) -> Any:
    """JSON, or else a Python literal; None where it is neither."""
    if (text[:1], text[-1:]) not in (("{", "}"), ("[", "]")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _field_of(value: Mapping[Any, Any]) -> str:
    """What to do about a mapping."""
    likely = ("ground_truth", "answer", "final_answer", "value", "target", "label", "solution")
    name = next((name for name in likely if name in value), next(iter(value), "value"))
    return f"not an answer; name its field by a path, such as `columns: {{answer: <column>.{name}}}`"


def _scalar(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"the number {value}")
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)


def _elements(values: list[Any]) -> Iterator[str]:
    """The elements of a list of answers: inner lists as tuples, numbers without thousands separators."""
    for value in values:
        value = structure(value)
        if isinstance(value, list):
            yield f"({', '.join(_elements(value))})"
            continue
        text = reference_text(value).strip()
        inner = _DOLLARS.fullmatch(text)
        text = next(part for part in inner.groups() if part is not None).strip() if inner else text
        yield re.sub(r"\{,\}|\\,|,", "", text) if _GROUPED.fullmatch(text) else text


def complaint(reference: str) -> str:
    r"""Why no model could meet a reference of mathematics by writing the answer it stands for; empty if one could.

    It looks at the text alone; whether algebra understands it is the grader's to say.

    Example:
        >>> complaint(r"\frac{1}{2}"), complaint("so 5 apples\n#### 5")
        ('', "a whole solution; `answer_pattern: '####\\s*(.+)'` reads the answer in it")
    """
    text = reference.strip()
    said = _WRAPPED.sub("", text).strip(" $\"'.()[]<>{}")
    if not any(letter.isalnum() or letter in "∅∞" for letter in said):
        return "empty" if not text else f"no answer, but {text[:20]!r}"
    if said.lower() in _NO_ANSWERS and said not in _ARE_ANSWERS:
        return f"no answer, but {text!r}"
    if isinstance(structure(text), Mapping | list):
        return f"the text of a {'list' if isinstance(structure(text), list) else 'mapping'}; name its field by a path"
    return _whole_solution(text)


def boxed(reference: str) -> str:
    r"""What stands in the last box of a reference; empty where there is none.

    Example:
        >>> boxed(r"$f(2)=\frac{4}{2}=\boxed{2}$."), boxed("2")
        ('2', '')
    """
    found = boxes(reference)
    return found[-1] if found else ""


def _whole_solution(text: str) -> str:
    box = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if "####" in text:
        return f"a whole solution; `answer_pattern: {GSM8K}` reads the answer in it"
    if box >= 0 and (_PROSE.search(text[:box]) or text.count(r"\boxed") > 1):
        return f"a whole solution; {BOXED}"
    if _THOUGHT.search(text):
        return f"a whole completion with tags; {PATTERN}"
    if _SAYS.search(text):
        return f"a sentence around an answer; {PATTERN}"
    words = sum(not word.startswith("\\") for word in _PROSE.findall(text))
    if words > MOST_WORDS or _ARGUES.search(text) or (_CHAIN.search(text) and r"\begin" not in text):
        return f"an explanation, not an answer; {PATTERN}"
    return f"several lines; {PATTERN}" if _lines(text) > 1 else ""


def _lines(text: str) -> int:
    """Lines that are not inside braces or an environment."""
    for _ in range(text.count("{")):
        text, changed = re.subn(r"\{[^{}]*\}", "", text)
        if not changed:
            break
    return 1 if r"\begin" in text else sum(bool(line.strip(" $")) for line in text.splitlines())


@dataclass(frozen=True, slots=True, kw_only=True)
class BadReference:
    """A reference that cannot be graded against."""

    row: int
    """Its position among the prompts that were checked."""
    source: str
    """Its data set."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceReport:
    """The outcome of `Verifiers.check_references`.

    Example:
        >>> report = ReferenceReport(checked=3, bad=[BadReference(row=1, source="sums", reason="empty")])
        >>> report.usable, str(report)
        ([0, 2], '1 of 3 references cannot be used and their rows are dropped: sums row 1 (empty)')
    """

    checked: int
    """How many prompts."""
    bad: list[BadReference] = field(default_factory=list)
    """In the order of their rows."""

    @property
    def usable(self) -> list[int]:
        """Positions of the prompts to keep."""
        dropped = {bad.row for bad in self.bad}
        return [row for row in range(self.checked) if row not in dropped]

    def __str__(self) -> str:
        if not self.bad:
            return f"all {self.checked} references agree with themselves"
        listed = ", ".join(f"{bad.source or 'unnamed'} row {bad.row} ({bad.reason})" for bad in self.bad[:20])
        more = f" and {len(self.bad) - 20} more" if len(self.bad) > 20 else ""
        return f"{len(self.bad)} of {self.checked} references cannot be used and their rows are dropped: {listed}{more}"


def of_maths(grader: MathGrader, reference: str) -> Future[str]:
    """Why no answer could be graded as right against a reference; empty if one could."""
    reason, inside = complaint(reference), boxed(reference)
    if reason:
        found: Future[str] = Future()
        found.set_result(reason)
        return found
    if not inside:
        return grader.check(reference)
    met: Future[str] = Future()
    graded = grader.grade(reference, rf"\boxed{{{inside}}}")
    graded.add_done_callback(lambda done: met.set_result(_unmet(done.result())))
    return met


def _unmet(verdict: Verdict) -> str:
    return f"not what stands in its box; {BOXED}" if verdict.label is Label.WRONG else ""
