"""Extraction of programs and of boxed answers: fixed cases and generated text."""
# ruff: noqa: RUF001, E501

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.verifiers import MathOptions
from prime_lightning.verifiers.code.text import program
from prime_lightning.verifiers.maths.compare import Question, compare, self_question
from prime_lightning.verifiers.maths.text import boxes, normalise

F = "```"
snippets = st.lists(
    st.sampled_from(
        [r"\boxed", r"\fbox", "{", "}", r"\{", r"\}", "1", "x", ",", "(", ")", "[", "]", r"\frac", r"\text", "_2", "^", "%", "$", r"\$", ".", " ", "\n", "=", r"\pm", "²", "½", "－", "１", r"\cup", "or", "cm", "\\", "#", F, "python", "\r\n", "\ufeff"]
    ),
    max_size=40,
).map("".join)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "entry_point", "code"),
    [
        ("x = 1", "", "x = 1"),
        (f"Text\n{F}python\nx = 1\n{F}\nMore", "", "x = 1\n"),
        (f"{F}\nx = 1\n{F}", "", "x = 1\n"),
        (f"{F}py\nx = 1\n{F}\n{F}python\nx = 2\n{F}", "", "x = 2\n"),
        (f"{F}python\nx = 1\n{F}\nRun\n{F}bash\npython x.py\n{F}", "", "x = 1\n"),
        (f"{F}python\nx = 1\n{F}\n{F}python\nx = 2", "", "x = 1\n"),
        (f"{F}python\nx = 2", "", "x = 2"),
        (f"{F}python\r\nif x:\r\n    y = 1\r\n{F}\r\n", "", "if x:\n    y = 1\n"),
        (f"\ufeff{F}python\n\ufeffx = 1\n{F}", "", "x = 1\n"),
        (f"{F}python\ndef f(): pass\n{F}\nUse it:\n{F}python\nprint(f())\n{F}", "f", "def f(): pass\n"),
        (f"{F}python\ndef f(): pass\n{F}\nUse it:\n{F}python\nprint(f())\n{F}", "", "print(f())\n"),
        (f"{F}python\nclass f:\n    pass\n{F}\n{F}python\ng = 1\n{F}", "f", "class f:\n    pass\n"),
        (f"{F}python\ndef f(): pass\n{F}\n{F}python\ndef f(): return 2\n{F}", "f", "def f(): return 2\n"),
        (f"````python\ns = '''\n{F}\n'''\n````", "", f"s = '''\n{F}\n'''\n"),
        ("~~~python\nx = 1\n~~~", "", "x = 1\n"),
        (f"1. Do\n\n   {F}python\n   def f():\n       return 1\n   {F}\n", "", "def f():\n    return 1\n"),
        (f"{F}java\nint x;\n{F}", "", "int x;\n"),
        ("", "", ""),
    ],
)
def test_programs(text: str, entry_point: str, code: str) -> None:
    assert program(text, entry_point) == code


@given(snippets, st.sampled_from(["", "f", "f("]))
def test_any_text_has_a_program(text: str, entry_point: str) -> None:
    assert isinstance(program(text, entry_point), str)


@given(snippets)
def test_any_text_has_boxes_or_none(text: str) -> None:
    for box in boxes(text):
        assert box
        assert box.removeprefix("-") in text


@given(snippets)
def test_normalising_any_text_ends(text: str) -> None:
    assert isinstance(normalise(text), str)


@given(snippets, snippets)
def test_comparing_any_two_texts_ends_without_raising(reference: str, answer: str) -> None:
    for options in (
        MathOptions(),
        MathOptions(percent="strict", units="strict", bases="ignore", ordered_lists=True, tolerance=0.0),
    ):
        assert isinstance(compare(reference, answer, options), (bool, Question))
    assert isinstance(self_question(reference), (str, Question))


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_integers_are_equal_only_to_themselves(left: int, right: int) -> None:
    assert compare(str(left), str(right), MathOptions()) is (left == right)
    assert compare(str(left), f"{left:,}", MathOptions()) is True


@given(st.integers(-999, 999), st.integers(1, 999), st.integers(-999, 999), st.integers(1, 999))
def test_fractions_are_compared_exactly(a: int, b: int, c: int, d: int) -> None:
    assert compare(rf"\frac{{{a}}}{{{b}}}", f"{c}/{d}", MathOptions()) is (a * d == c * b)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=5), st.permutations(range(5)))
def test_order_counts_in_tuples_and_not_in_sets(numbers: list[int], order: list[int]) -> None:
    shuffled = [numbers[i] for i in order if i < len(numbers)]
    plain, mixed = (",".join(map(str, side)) for side in (numbers, shuffled))
    assert compare(f"({plain})", f"({mixed})", MathOptions()) is (numbers == shuffled)
    assert compare(rf"\{{{plain}\}}", rf"\{{{mixed}\}}", MathOptions()) is True
    assert compare(rf"\{{{plain}\}}", f"({mixed})", MathOptions()) is False
