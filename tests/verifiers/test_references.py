r"""References: what a value of a data set stands for, and which ones no answer could meet."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.verifiers import Verifiers
from prime_lightning.verifiers.references import complaint, reference_text

from .conftest import prompt

GSM8K = "She has 2+3=<<2+3=5>>5 apples.\n#### 5"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("5", "5"),
        (5, "5"),
        (5.0, "5"),
        (0, "0"),
        (0.1, "0.1"),
        (10**40 + 1, str(10**40 + 1)),
        (Decimal("0.10"), "0.10"),
        (Decimal("1E+30"), "1" + 30 * "0"),
        (True, "True"),
        (["5"], "5"),
        (["5", "7"], "5, 7"),
        (["$x=5$", r"\(x=7\)"], "x=5, x=7"),
        (["1,234", "5"], "1234, 5"),
        ([5, 7.5], "5, 7.5"),
        ([[1, 2], [3, 4]], "(1, 2), (3, 4)"),
        (["$(1,8), (2,7)$"], "(1,8), (2,7)"),
        (("a", "b"), "a, b"),
        (np.array(["a", "b"]), "a, b"),
        ('["7", "8"]', "7, 8"),
        ("['7']", "7"),
        ("[1, 2]", "[1, 2]"),
        ("(1, 2)", "(1, 2)"),
        (r"\{1, 2\}", r"\{1, 2\}"),
    ],
)
def test_a_value_stands_for_one_text(value: Any, text: str) -> None:
    assert reference_text(value) == text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "nothing"),
        ("", "empty text"),
        ("  ", "empty text"),
        ([], "an empty list"),
        (["5", None], "nothing"),
        ({"value": "5"}, r"a mapping with the fields \['value'\].*columns: {answer: <column>.value"),
        ({"style": "rule", "ground_truth": "5"}, "columns: {answer: <column>.ground_truth"),
        ("{'target': 24, 'numbers': [1, 2]}", "a mapping"),
        ('{"value": "5"}', "a mapping"),
        ([{"value": "5"}], "a mapping"),
        (float("nan"), "the number nan"),
        (float("inf"), "the number inf"),
    ],
)
def test_what_is_no_answer_is_named(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reference_text(value)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (GSM8K, "answer_pattern: '####"),
        (r"First $2+3$, so it is $\boxed{5}$.", "answer_pattern: boxed"),
        (r"$f(g(x)) = f(-3) = 2(-3) + 1 = \boxed{-5}$", "answer_pattern: boxed"),
        ("The answer is 5.", "a sentence around an answer"),
        ("Answer: 5", "a sentence around an answer"),
        ("<think>Let me see.</think> 5", "tags"),
        ("Since $x>0$, $x=5$.", "an explanation"),
        (r"f(2)=2\cdot 2+1=5", "an explanation"),
        ("first they meet on the bridge and then they walk together into the town where the others wait with bread "
         "and wine for all of them", "an explanation"),
        ("5\n7", "several lines"),
        ("proof", "no answer"),
        (r"\text{Proof.}", "no answer"),
        (r"\boxed{notfound}", "no answer"),
        ("Not Found", "no answer"),
        ("None", "no answer"),
        ("nan", "no answer"),
        ("N/A", "no answer"),
        ("", "empty"),
        ("?", "no answer"),
        ("...", "no answer"),
        (r"\boxed{}", "no answer"),
        ("$$", "no answer"),
        ("{'value': '5'}", "mapping"),
        ("['5', '7']", "list"),
    ],
)  # fmt: skip
def test_a_reference_that_no_answer_meets_is_named(verifiers: Verifiers, reference: str, said: str) -> None:
    report = verifiers.check_references([prompt("math", "1"), prompt("math", reference), prompt("math", "2")])
    assert [one.row for one in report.bad] == [1]
    assert said in report.bad[0].reason
    assert report.usable == [0, 2]


@pytest.mark.parametrize(
    "reference",
    [
        *("5", "-0.10", r"\frac{1}{2}", "x=5, x=7", "(1,8), (2,7)", r"\{1,2\}", "[0,1)", r"x \in [0,1]", "y=2x+1"),
        *("A", r"\text{(B)}", r"\text{none}", r"\text{no solution}", "none", "undefined", "True", r"\emptyset"),
        *("∅", r"\infty", r"\boxed{5}", r"$y_3 = \boxed{-0.875}$", "$$\n5\n$$", "90\\text{ square\nunits}", "10^{400}"),
        *(r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{cases} x=1+2 \\ y=2=1+1 \end{cases}", "a=b=2", "Anna and Ben"),
        str(10**30 + 7),
    ],
)  # fmt: skip
def test_what_an_answer_can_meet_is_kept(verifiers: Verifiers, reference: str) -> None:
    assert not verifiers.check_references([prompt("math", reference)]).bad


@pytest.mark.parametrize(
    ("value", "right", "wrong"),
    [
        (["5", "7"], ["7, 5", "5,7", r"\{5,7\}", r"5 \text{ and } 7"], ["5", "5, 8", "(7,5)", "5, 7, 9"]),
        (["x=5", "x=7"], ["5,7", "x=7, x=5"], ["5", "x=5"]),
        (["$x=2$", "$x=3$"], ["3,2"], ["2"]),
        (["$(1,8), (2,7)$"], ["(1,8), (2,7)", "(2,7), (1,8)"], ["(8,1), (2,7)", "(1,8)"]),
        ([[1, 8], [2, 7]], ["(2,7), (1,8)"], ["(8,1), (2,7)"]),
        (["$f(x)=2x$"], ["f(x)=2x", "2x"], ["f(x)=3x"]),
        (["1,234", "5"], ["5, 1234", "1234, 5"], ["1, 234, 5"]),
        ("(1, 2)", ["(1,2)"], ["(2,1)"]),
        (10**30 + 7, [str(10**30 + 7)], [str(10**30 + 8), str(10**30)]),
        (Decimal("0.10"), ["0.1", r"\frac{1}{10}"], ["0.11"]),
    ],
)  # fmt: skip
def test_a_list_means_all_of_it_in_any_order(
    verifiers: Verifiers, value: Any, right: list[str], wrong: list[str]
) -> None:
    reference = prompt("math", reference_text(value))
    assert [verifiers.verify(reference, rf"\boxed{{{box}}}").score for box in right] == [1.0] * len(right)
    assert [verifiers.verify(reference, rf"\boxed{{{box}}}").score for box in wrong] == [0.0] * len(wrong)


@given(st.lists(st.integers(-(10**25), 10**25), min_size=1, max_size=6), st.randoms())
def test_any_list_of_numbers_is_met_in_any_order_with_all_its_digits(numbers: list[int], random: Any) -> None:
    reference = prompt("math", reference_text(numbers))
    shuffled = random.sample(numbers, len(numbers))
    with_one_more = [*shuffled[:-1], shuffled[-1] + 1]
    with Verifiers(workers=1) as verifiers:
        assert verifiers.verify(reference, rf"\boxed{{{', '.join(map(str, shuffled))}}}").score == 1.0
        assert verifiers.verify(reference, rf"\boxed{{{', '.join(map(str, with_one_more))}}}").score == 0.0


def test_no_reference_of_a_public_set_is_complained_of_but_all_its_solutions(rows) -> None:
    for name in ("math500.jsonl", "amc.jsonl", "olympiadbench.jsonl", "minerva_math.jsonl", "svamp_test.jsonl"):
        assert [row["answer"] for row in rows(name) if complaint(row["answer"])] == []
    for name in ("math500.jsonl", "aime2024.jsonl", "gsm8k_test.jsonl"):
        assert [row["solution"] for row in rows(name) if not complaint(row["solution"])] == []
