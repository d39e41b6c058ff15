"""Where answers stand: behind the reasoning, in a box, stated in words, or in the last lines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.verifiers import MathOptions, Verifiers, final_answer
from prime_lightning.verifiers.jail.graders.maths import find
from prime_lightning.verifiers.maths.answer import answer_of
from prime_lightning.verifiers.maths.final import after_reasoning, stated

from .conftest import prompt
from .math_cases import CASES

FINAL, ANYWHERE = MathOptions(answer="final"), MathOptions(answer="anywhere")

STATED = [
    ("The answer is 42.", "42"),
    ("The answer is: $42$", "42"),
    ("Hence the answer is: 42.", "42"),
    ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
    ("Final Answer: The final answer is 1.5. I hope it is correct.", "1.5"),
    ("Final Answer: The final answer is $4$ inches per second. I hope it is correct.", r"4\text{ inches per second}"),
    ("The answer to this question is \\(x = 5\\).", "x = 5"),
    ("2+2 = <<2+2=4>>4 apples\n#### 4", "4"),
    ("2+2 = <<2+2=4>>4 apples\nA: 4", "4"),
    ("Answer: 18 dollars", "18 dollars"),
    ("**Answer:** 18", "18"),
    ("**Answer: 18**", "18"),
    ("### Final Answer\n\n\\[ x^2 \\]", "x^2"),
    ("So she pays **18 dollars**.", "18 dollars"),
    ("The answer is **18**.", "18"),
    ("The answers are $3$ and $4$.", "3, 4"),
    ("The answer is $3$ or $4$.", "3 or 4"),
    ("The answer is $5$, because $2+3=5$.", "5"),
    ("<answer>7</answer>", "7"),
    ("The answer is 3. No: the answer is 4.", "4"),
    ("She pays 18 dollars.", None),
    ("I **think** so, she pays 18 dollars", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), STATED)
def test_what_is_stated(text: str, answer: str | None) -> None:
    assert stated(text) == answer
    assert answer_of(text, MathOptions()) is None
    assert final_answer(text, "math") is None


def test_a_box_counts_more_than_words_and_an_open_one_is_no_answer() -> None:
    assert answer_of(r"The answer is 4. \boxed{5}. The answer is 6.", FINAL) == "5"
    assert answer_of(r"The answer is 4. \boxed{5", FINAL) is None
    assert final_answer("The answer is $\\dfrac12$.", "math", "final") == r"\frac{1}{2}"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("a <think>b</think> c", " c"),
        ("b</think> c", " c"),
        ("<think>b</think> c <thinking>d</thinking>e", "e"),
        ("<think>b", None),
        ("<think>b</think> <think>c", None),
        ("<|begin_of_thought|>b<|end_of_thought|>c", "c"),
        ("no block", "no block"),
    ],
)
def test_reasoning_is_cut_off(text: str, rest: str | None) -> None:
    assert after_reasoning(text, MathOptions().reasoning_tags) == rest


def test_tags_of_reasoning_are_an_option() -> None:
    options = MathOptions(reasoning_tags=("<plan> </plan>",))
    assert answer_of(r"<plan>\boxed{4}</plan>", options) is None
    assert answer_of(r"<think>\boxed{4}</think>", options) == "4"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Therefore, the value is $33$.", "33"),
        ("so she has 8 left.", "8"),
        ("So it costs \\$1,250.50", "1,250.50"),
        ("the total is $325,000 - $130,000 = $195,000.", "195,000"),
        ("so they are $5$ and $6$.", "5 and 6"),
        ("thus \\frac{1}{2}", r"\frac{1}{2}"),
        ("We get 5%.", "5%"),
        ("&= \\frac{F_{n + 2}}{F_n^{16}} \\\\ &= \\sqrt{3 + 4", ""),
        ("no numbers here", ""),
    ],
)
def test_what_the_last_lines_hold(text: str, found: str) -> None:
    assert find(text) == found


@pytest.fixture(scope="module")
def anywhere(tier: str) -> Iterator[Verifiers]:
    with Verifiers(workers=1, math=ANYWHERE) as made:
        yield made


@pytest.mark.parametrize(
    ("reference", "text", "correct"),
    [
        ("33", "We add.\n\nTherefore, the value is $33$.", True),
        ("8", "She eats 4, so she has 8 left", True),
        ("4", "She eats 4, so she has 8 left", False),
        (r"2\sqrt{2}", r"Hence the length is $\sqrt{8}$.", True),
        (r"2\sqrt{2}", r"Hence the length is $\sqrt{6}$.", False),
        ("5", r"Hence it is $5$ or $6$.", False),
        ("5", r"<think>so it is 5", False),
        ("5", "It is 5.\nNo.\nI do not know.\nReally.\nSorry.", False),
        ("6", r"\boxed{5}. So 6", False),
        ("6", r"The answer is 5, and not 6", False),
        ("7", "", False),
    ],
)
def test_answers_anywhere(anywhere: Verifiers, reference: str, text: str, correct: bool) -> None:
    assert (anywhere.verify(prompt("math", reference), text).score == 1.0) == correct


FORMS = {
    "boxed": [r"so $\boxed{{{}}}$.", r"First \boxed{{1}}, no: \boxed{{{}}}", r"<think>\boxed{{1}}</think>\boxed{{{}}}"],
    "final": [
        "Final Answer: The final answer is ${}$. I hope it is correct.",
        "The answer is ${}$.",
        "the answer is: {}",
        "We add.\n#### {}",
        "We add.\nA: {}",
        "We add.\n\nAnswer: {}",
        "So it is **{}**.",
        "So it is **{}**",
        "<answer>{}</answer>",
    ],
    "anywhere": ["Therefore, the value is ${}$.", "We see that\n\\[ {} \\]"],
}
plain = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.decimals(0, 999, places=2, allow_nan=False).map(str),
    st.tuples(st.integers(1, 999), st.integers(2, 999)).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
    st.tuples(st.integers(1, 99), st.integers(1, 99)).map(lambda t: f"({t[0]}, {t[1]})"),
    st.integers(2, 99).map(lambda n: rf"{n}\sqrt{{3}}"),
)
wrapped = st.sampled_from([(place, form) for place, forms in FORMS.items() for form in forms])


def changed(answer: str, position: int) -> str:
    """The same text with another digit at one of its digits: no digit of these forms may be left out."""
    digits = [i for i, letter in enumerate(answer) if letter.isdigit()]
    at = digits[position % len(digits)]
    return answer[:at] + str((int(answer[at]) + 1 + position % 8) % 10) + answer[at + 1 :]


@given(plain, wrapped, st.integers(0, 99))
def test_every_form_of_an_answer_is_read_and_no_digit_may_change(
    anywhere: Verifiers, answer: str, wrapped: tuple[str, str], position: int
) -> None:
    text = wrapped[1].format(answer)
    assert anywhere.verify(prompt("math", answer), text).score == 1.0
    other = changed(answer, position)
    if other.count(r"\frac") == 0 or not same_fraction(answer, other):
        assert anywhere.verify(prompt("math", answer), wrapped[1].format(other)).score == 0.0


def same_fraction(one: str, other: str) -> bool:
    a, b, c, d = (
        int(part) for text in (one, other) for part in text.removeprefix(r"\frac{").removesuffix("}").split("}{")
    )
    return a * d == b * c


@pytest.mark.parametrize("form", ["Final Answer: The final answer is ${}$. I hope it is correct.", "so $${}$$"])
def test_the_table_holds_outside_a_box(anywhere: Verifiers, form: str) -> None:
    cases = [
        (reference, answer, same)
        for rows in CASES.values()
        for reference, answer, same in rows
        if not {"$", "\n"} & set(answer) and "answer is" not in answer
    ]
    verdicts = anywhere.map((prompt("math", reference), form.format(answer)) for reference, answer, _ in cases)
    assert [case for case, verdict in zip(cases, verdicts, strict=True) if (verdict.score == 1.0) != case[2]] == []
