"""The labelled table, and what options, extraction and the check of references make of answers."""

from __future__ import annotations

import pytest

from prime_lightning.verifiers import MathOptions, Verifiers

from .conftest import prompt
from .math_cases import CASES, POLICY, TEXTS


def test_the_table_is_as_large_as_promised() -> None:
    assert len(CASES) >= 50
    assert sum(map(len, CASES.values())) >= 150


def test_the_table(verifiers: Verifiers) -> None:
    pairs = [(name, reference, box, same) for name, cases in CASES.items() for reference, box, same in cases]
    verdicts = verifiers.map((prompt("math", reference), rf"so \boxed{{{box}}}.") for _, reference, box, _ in pairs)
    wrong = [case for case, verdict in zip(pairs, verdicts, strict=True) if (verdict.score == 1.0) != case[3]]
    assert not wrong


@pytest.mark.parametrize(("reference", "text", "correct"), TEXTS)
def test_extraction(verifiers: Verifiers, reference: str, text: str, correct: bool) -> None:
    assert (verifiers.verify(prompt("math", reference), text).score == 1.0) == correct


@pytest.mark.parametrize(("reference", "correct", "wrong"), POLICY)
def test_the_policy_of_the_documentation(
    verifiers: Verifiers, reference: str, correct: list[str], wrong: list[str]
) -> None:
    assert [
        box for box in correct if verifiers.verify(prompt("math", reference), rf"\boxed{{{box}}}").score != 1.0
    ] == []
    assert [box for box in wrong if verifiers.verify(prompt("math", reference), rf"\boxed{{{box}}}").score != 0.0] == []


@pytest.mark.parametrize(
    ("options", "reference", "box", "correct"),
    [
        (MathOptions(percent="strict"), "50", r"50\%", False),
        (MathOptions(percent="strict"), "0.5", r"50\%", True),
        (MathOptions(units="strict"), r"5\text{ cm}", "5", False),
        (MathOptions(units="strict"), r"5\text{ cm}", r"5\mathrm{cm}", True),
        (MathOptions(bases="ignore"), "1010_2", "1010", True),
        (MathOptions(ordered_lists=True), "1,2", "2,1", False),
        (MathOptions(tolerance=0.0), r"\frac{1}{3}", "0.33333333", False),
        (MathOptions(tolerance=0.01), r"\pi", "3.14", True),
        (MathOptions(tolerance=0.01), r"\frac{1}{2}", "0.501", False),
    ],
)
def test_options_per_data_set(tier: str, options: MathOptions, reference: str, box: str, correct: bool) -> None:
    with Verifiers(workers=1, math=options) as verifiers:
        assert (verifiers.verify(prompt("math", reference), rf"\boxed{{{box}}}").score == 1.0) == correct


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("answer", "box"),
        ("reasoning_tags", ("<think>",)),
        ("percent", "loose"),
        ("units", ""),
        ("bases", "ten"),
        ("tolerance", 1.5),
    ],
)
def test_a_misspelt_option_says_what_was_expected(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"Expected math option `{name}`"):
        MathOptions(**{name: value})  # type: ignore[arg-type]


def test_identical_pairs_are_asked_once(verifiers: Verifiers) -> None:
    first = verifiers.verify(prompt("math", r"\sqrt{50}"), r"\boxed{5\sqrt{2}}")
    again = verifiers.verify(prompt("math", r"\sqrt{50}"), r"\boxed{5\sqrt{2}}")
    assert first.seconds > 0
    assert (again.score, again.seconds) == (1.0, 0.0)


def test_references_of_public_sets_agree_with_themselves(rows, verifiers: Verifiers) -> None:
    prompts = [
        prompt("math", row["answer"], source=name)
        for name in (
            "math500.jsonl",
            "aime2024.jsonl",
            "aime2025.jsonl",
            "amc.jsonl",
            "minerva_math.jsonl",
            "olympiadbench.jsonl",
        )
        for row in rows(name)
    ]
    assert not verifiers.check_references(prompts).bad


def test_an_unusable_reference_is_named_with_its_row(verifiers: Verifiers) -> None:
    report = verifiers.check_references(
        [prompt("math", answer) for answer in ("1", "", r"\frac{1}{", "x" * 1001, "2", "x^2")]
    )
    assert [one.row for one in report.bad] == [1, 2, 3]
    assert report.usable == [0, 4, 5]
    assert "row 2" in str(report)
