"""Grades maths: long-lived workers that ask math-verify whether two expressions are equal.

Protects: the caller, by being killable; the machine, by the same walls as for programs. math-verify's own time-outs
are off:
they work by SIGALRM, in whole seconds, and not inside long C calls. No text reaches `sympify` or `parse_expr`: only
the LaTeX grammar reads it.
Leaves out: a string that took over the parser could answer wrongly for the rest of this
worker's life.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import re
import resource
import sys
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.parser import extract_latex, get_extraction_regexes

from prime_lightning.verifiers.jail import wire
from prime_lightning.verifiers.jail.cage import Cage
from prime_lightning.verifiers.jail.graders import equality
from prime_lightning.verifiers.jail.zygote import fork

PERSISTENT = True
_STACK = 3000  # Python frames; deeper expressions are the parser's RecursionError, not a crash

# Units are our own affair: math-verify's would take the variable c for cents.
_PLAIN = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
)
_BOXED = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=_PLAIN)]
_PASSAGE = LatexExtractionConfig(boxed_match_priority=-1)
_FORMULAS, _NUMBERS = (
    [(rank, pattern) for pattern, rank in patterns]
    for patterns, _ in get_extraction_regexes([_PASSAGE, ExprExtractionConfig()])
)
_FORMULA = re.compile(r"\$\$.*?\$\$|(?<!\\)\$[^$\n]*[\\^_=][^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
_MONEY = re.compile(r"\\\$(?=\d)|\$(?=\d[\d,.]*(?:[-+*/=]|\s|\.?$)[^$\n\\]*\$\d)|(?<=[=+-] )\$(?=\d[\d,.]*(?:\s|$))")
_NAMED = re.compile(r"^[^=+*/-]{1,20}=")
_LOOSE = re.compile(r"^.*(?:\\[A-Za-z]|\\\\|[_^]\{).*$", re.MULTILINE)  # LaTeX without dollars: its numbers are parts
_PLAIN_DECIMAL = re.compile(r"-?\d{0,20}\.(\d{1,40})")
_ROOT = re.compile(r"\\sqrt|\^")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")

_WARM = (
    (r"\frac{1}{2}", "0.5"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"x^2+2x+1", "(x+1)^2"),
    (r"(-\infty,2]", r"x\le 2"),
    (r"\frac{\pi}{4}", r"\tan^{-1}(1)"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"(1,\frac{1}{2})", "(1,0.5)"),
    ("3+4i", "4i+3"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\log_2 8", "3"),
    (r"\sin^2 x+\cos^2 x", "1"),
    ("y=2x+3", "2x-y+3=0"),
    (r"\binom{5}{2}", "10"),
    (r"[0,1)\cup(2,3]", r"(2,3]\cup[0,1)"),
    (r"e^{2\ln 3}", "9"),
    (r"\sum_{k=1}^{3} k", "6"),
    ("5!", "120"),
    (r"|x-1|", r"|1-x|"),
    (r"\frac{a+b}{c}", r"\frac{a}{c}+\frac{b}{c}"),
    (r"3^{1/3}", r"\sqrt[3]{3}"),
    ("1.5\\times 10^{3}", "1500"),
    (r"0<x<1", "(0,1)"),
    (r"\lfloor 2.5\rfloor", "2"),
    (r"\frac{\sqrt{2}+\sqrt{6}}{4}", r"\sin 75^\circ"),
    (r"\overline{AB}", "AB"),
    (r"x_1+x_2", "x_2+x_1"),
    ("2+3", "6"),
    (r"\text{even}", "odd"),
)


def prepare(config: dict[str, Any]) -> None:
    """Import math-verify and warm its parser: the caches that fill here are shared by all workers."""
    logging.disable(logging.CRITICAL)
    equality.install()
    for reference, answer in _WARM:
        equal(reference, answer)


def equal(reference: str, answer: str, tolerance: float = 1e-6) -> bool:
    """Whether two LaTeX expressions are equal: math-verify's word with exact comparisons, but for imaginary numbers."""
    sides = [parse(rf"\boxed{{{text}}}", _BOXED, parsing_timeout=None) for text in (reference, answer)]
    allowed = min(tolerance, _last_digit(reference))
    if verify(*sides, float_rounding=allowed, allow_set_relation_comp=True, timeout_seconds=None):
        return True
    if _IMAGINARY.search(reference + " " + answer) and _same_complex(reference, answer):
        return True
    left, right = (side[0] if side else None for side in sides)
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return False
    if left.is_Symbol or right.is_Symbol:  # math-verify only looks at their names
        return left.free_symbols == right.free_symbols and equality.same_expressions(left, right)
    return bool(_ROOT.search(reference + answer)) and equality.same_roots(left, right)


def _last_digit(reference: str) -> float:
    """Relative size of the last digit of a decimal: it was rounded there and no coarser. Infinite for anything else."""
    match = _PLAIN_DECIMAL.fullmatch(reference)
    value = abs(float(reference)) if match else 0.0
    return 10.0 ** -len(match[1]) / value if match and value else math.inf


def _same_complex(reference: str, answer: str) -> bool:
    """math-verify takes `i` for a real variable where it is not in the usual form a + bi."""
    try:
        left, right = (latex2sympy(text, is_real=False, convert_degrees=False) for text in (reference, answer))
        left, right = (e.subs({s: sympy.I for s in e.free_symbols if s.name == "i"}) for e in (left, right))
        return bool(sympy.simplify(left - right) == 0)
    except Exception:  # the parser raises what it likes; then they are not shown to be equal
        return False


def decide(references: list[str], answers: list[str], ordered: bool, tolerance: float) -> bool:
    """Whether all pairs are equal, or, unordered, whether the two lists are equal as bags."""
    if ordered:
        return all(equal(*pair, tolerance) for pair in zip(references, answers, strict=True))
    rest = list(answers)
    for reference in references:
        match = next((answer for answer in rest if equal(reference, answer, tolerance)), None)
        if match is None:
            return False
        rest.remove(match)
    return not rest


def find(text: str) -> str:
    """What math-verify would take for the answer of a text, as it stands there; empty where it finds none.

    Its patterns are used in its order: by priority, then the one that ends last. A formula that its grammar does not
    understand is passed over, and taken if nothing else is there and it has one value. Numbers are looked for outside
    formulas, and not read here, for it reads them by `parse_expr`, which executes code.
    """
    text = re.sub(r",\s+(and|or)\b", r" \1", _MONEY.sub(" ", text))
    prose = _LOOSE.sub(_blank, _FORMULA.sub(_blank, text))
    matches = [
        (rank, -match.end(), match.start(), match)
        for patterns, where in ((_FORMULAS, text), (_NUMBERS, prose))
        for rank, pattern in patterns
        for match in pattern.finditer(where)
    ]
    unread = ""
    for *_, match in sorted(matches, key=lambda found: found[:3]):
        formulas = [value for name, value in match.groupdict().items() if value and "latex" in name]
        taken = _listed(match, formulas) if formulas else _number(match)
        if taken and (not formulas or extract_latex(match, _PASSAGE)[0] is not None):
            return taken
        unread = unread or (taken if len(formulas) == 1 and "=" not in _NAMED.sub("", taken) else "")
    return unread


def _blank(match: re.Match[str]) -> str:
    return "x" * len(match[0])


def _listed(match: re.Match[str], formulas: list[str]) -> str:
    percent = any(value for name, value in match.groupdict().items() if name.endswith("percent"))
    return " and ".join(formulas) + (r"\%" if percent else "")


def _number(match: re.Match[str]) -> str:
    groups = {name: value for name, value in match.groupdict().items() if value}
    percent = "%" if groups.pop("percent", "") else ""
    return "".join(groups.values()).strip(" \n*.,=") + percent


def start(cage: Cage, job: dict[str, Any], descriptors: list[int]) -> list[int]:
    """One worker, speaking on the descriptor that came."""
    child = fork(lambda: _work(cage, descriptors[0], job["memory_bytes"]))
    os.close(descriptors[0])
    return [child]


def _work(cage: Cage, channel: int, memory_bytes: int) -> None:
    cage.enter({3: channel}, cpu_seconds=0, memory_bytes=memory_bytes)
    gc.enable()
    sys.setrecursionlimit(_STACK)
    while True:
        asked = json.loads(wire.read_frame(3))
        said = find(asked["find"]) if isinstance(asked, dict) else decide(*asked)
        wire.write_frame(3, wire.dumps([said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10]))
