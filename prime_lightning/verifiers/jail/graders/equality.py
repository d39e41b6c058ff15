r"""Exact equality in place of math-verify's rounding: `install` puts these functions where its grader looks for them.

math-verify 0.9 compares numbers after rounding to six or fifteen places, which calls 1/2^60 and 1/2^61 equal, and two
equations equal that have no solution. Here an exact expression equals only what is exactly it. A decimal on one side
may be off by a relative tolerance where the other side has no finite decimal form.
"""

from __future__ import annotations

import itertools
from typing import Any

import sympy
from math_verify import grader

_DIGITS = 100
_AGREE = sympy.Float(10, _DIGITS) ** -90
_POINTS = (sympy.Rational(7, 5), sympy.Rational(12, 29), sympy.Rational(31, 3))
_MOST_SYMBOLS = 3
_solve_and_compare = grader.sympy_solve_and_compare


def install() -> None:
    """Replace math-verify's comparisons of numbers, of expressions and of equations."""
    grader.sympy_numeric_eq = same_numbers
    grader.sympy_symbolic_eq = same_expressions
    grader.sympy_solve_and_compare = same_solutions


def rational(expression: Any) -> Any:
    """The expression with its decimals as fractions.

    Example:
        >>> rational(sympy.Float("2.5") * sympy.pi)
        5*pi/2
    """
    return expression.xreplace({number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)})


def same_numbers(reference: Any, answer: Any, tolerance: float, _: int = 0) -> bool:
    """Whether two expressions without variables, or two matrices of such, have the same value."""
    reference, answer = (grader.safe_sympy_doit(side) for side in (reference, answer))
    if isinstance(reference, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return reference.shape == answer.shape and all(
            same_numbers(*pair, tolerance) or same_expressions(*pair)
            for pair in zip(reference.flat(), answer.flat(), strict=True)
        )
    if not all(isinstance(side, sympy.Expr) for side in (reference, answer)):
        return False
    rounded = [side.has(sympy.Float) for side in (reference, answer)]
    reference, answer = rational(reference), rational(answer)
    if reference == answer:
        return True
    if reference.free_symbols or answer.free_symbols:
        return False
    if sum(rounded) == 1 and not _finite(answer if rounded[0] else reference):
        return _close(reference, answer, sympy.Rational(str(tolerance)))
    zero = (reference - answer).is_zero
    return _close(reference, answer, _AGREE) if zero is None else bool(zero)


def _finite(number: Any) -> bool:
    """Whether a number has a finite decimal form."""
    if not number.is_Rational:
        return False
    return set(sympy.factorint(number.q, limit=10)) <= {2, 5}


def _close(reference: Any, answer: Any, tolerance: Any) -> bool:
    try:
        left, right = (side.evalf(_DIGITS, maxn=2 * _DIGITS) for side in (reference, answer))
        return bool(abs(left - right) <= tolerance * max(abs(left), abs(right)))
    except (TypeError, ValueError, ArithmeticError):
        return False


def same_expressions(reference: Any, answer: Any) -> bool:
    """Whether the difference of two expressions, or matrices, simplifies to zero."""
    try:
        difference = sympy.simplify(rational(reference) - rational(answer))
        return bool(difference.is_zero_matrix if isinstance(difference, sympy.MatrixBase) else difference.is_zero)
    except Exception:  # sympy raises what it likes; then they are not shown to be equal
        return False


def same_solutions(reference: Any, answer: Any, tolerance: float, precision: int) -> bool:
    """Whether two relations have the same solutions: one equation is a multiple of the other, or both are solved."""
    if isinstance(reference, sympy.Eq) and isinstance(answer, sympy.Eq):
        left, right = (rational(side.lhs - side.rhs) for side in (reference, answer))
        factor = sympy.simplify(left / right)
        if not factor.free_symbols:
            return bool(factor.is_finite and factor.is_nonzero)
        if not sympy.solve(left, left.free_symbols):  # no solution says nothing
            return False
    return bool(_solve_and_compare(reference, answer, tolerance, precision))


def same_roots(reference: Any, answer: Any) -> bool:
    """Whether two expressions with roots of variables are equal wherever both are real, at least somewhere.

    Their squares must be equal, and at no choice of signs of the variables may the two differ, or only one be real:
    sqrt(1/n) is 1/sqrt(n), and sqrt(x^2) is not x.

    Example:
        >>> n, x = sympy.symbols("n x", real=True)
        >>> same_roots(sympy.sqrt(1 / n), 1 / sympy.sqrt(n)), same_roots(sympy.sqrt(x**2, evaluate=False), x)
        (True, False)
    """
    symbols = sorted(reference.free_symbols, key=str)
    if not 1 <= len(symbols) <= _MOST_SYMBOLS or set(symbols) != answer.free_symbols:
        return False
    if not any(power.exp.is_Rational and not power.exp.is_Integer for power in _powers(reference) | _powers(answer)):
        return False
    reference, answer = rational(reference), rational(answer)
    if sympy.simplify(sympy.expand(reference**2) - sympy.expand(answer**2)) != 0:
        return False
    met = False
    for signs in itertools.product((1, -1), repeat=len(symbols)):
        for shift in range(len(_POINTS)):
            point = {s: sign * _POINTS[(i + shift) % 3] for i, (s, sign) in enumerate(zip(symbols, signs, strict=True))}
            left, right = (sympy.N(side.subs(point), 50) for side in (reference, answer))
            if left.is_real != right.is_real or (left.is_real and abs(left - right) > abs(left) / 10**30):
                return False
            met = met or bool(left.is_real)
    return met


def _powers(expression: Any) -> set[Any]:
    found: set[Any] = expression.atoms(sympy.Pow)
    return found
