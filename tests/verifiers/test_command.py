"""`prime-lightning verify`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prime_lightning.cli.commands.verify import main

from .conftest import TIERS


def run(tmp_path: Path, kind: str, rows: list[dict[str, Any]], *more: str) -> tuple[int, list[dict[str, Any]]]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--kind", kind, "--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), *more]
    code = main(arguments)
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    return code, [json.loads(line) for line in written]


def test_maths(tier: str, tmp_path: Path, leaves_nothing: None) -> None:
    rows = [
        {"id": 7, "answer": "0.5", "completion": r"\boxed{\frac12}"},
        {"id": "b", "answer": "7", "completion": r"\boxed{8}"},
        {"id": "c", "answer": r"\sqrt{8}", "completion": r"\boxed{2\sqrt{2}}"},
        {"id": "d", "answer": 5, "completion": ""},
    ]
    code, written = run(tmp_path, "math", rows, "--workers", "1")
    assert code == 0
    assert [(row["id"], row["verdict"], row["score"]) for row in written] == [
        (7, "correct", 1.0), ("b", "wrong", 0.0), ("c", "correct", 1.0), ("d", "wrong", 0.0),
    ]  # fmt: skip
    assert all(set(row) == {"id", "verdict", "score", "reason", "seconds"} for row in written)
    assert all(row["seconds"] >= 0 for row in written)


@pytest.mark.skipif(not TIERS, reason="no sandbox here")
def test_code(tier: str, tmp_path: Path, leaves_nothing: None) -> None:
    rows = [
        {"id": n, "tests": ["assert f(1) == 2", "assert f(2) == 4"], "setup": "", "completion": program}
        for n, program in enumerate(
            ["def f(x): return 2 * x", "def f(x): return 2", "def f(x): return 0", "```python\ndef f(x): return x + x"]
        )
    ]
    rows.append(
        {
            "id": "check",
            "test": "def check(c):\n    assert c(1) == 2",
            "entry_point": "f",
            "completion": "def f(x): return 2",
        }
    )
    rows.append({"id": "none", "completion": "def f(x): return 2"})
    code, written = run(
        tmp_path, "code", rows, "--workers", "2", "--code.cpu_seconds", "2", "--code.cache_folder", str(tmp_path)
    )
    assert code == 0
    assert [row["verdict"] for row in written] == ["correct", "partial", "wrong", "correct", "correct", "unknown"]
    assert [row["score"] for row in written] == [1.0, 0.5, 0.0, 1.0, 1.0, None]


@pytest.mark.parametrize("line", ["{broken", "[]", '{"id": 1}', '{"completion": "x"}', '{"id": 1, "completion": 2}'])
def test_a_bad_line_is_named_before_any_work(tmp_path: Path, line: str, capsys) -> None:
    good = json.dumps({"id": 1, "answer": "1", "completion": "x"})
    (tmp_path / "in.jsonl").write_text(f"{good}\n{line}\n")
    arguments = ["--kind", "math", "--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 2
    assert "line 2" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_no_rows(tmp_path: Path) -> None:
    assert run(tmp_path, "math", []) == (0, [])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"ground_truth": "12"}, r"an `answer` in line 2 .* got the fields \['completion', 'ground_truth', 'id'\]"),
        ({"answer": None}, "in line 2 .* got nothing"),
        ({"answer": ""}, "in line 2 .* got empty text"),
        ({"answer": []}, "in line 2 .* got an empty list"),
        ({"answer": {"value": "12"}}, "in line 2 .* got a mapping"),
    ],
)
def test_a_row_without_an_answer_is_named_before_any_work(tmp_path: Path, answer: dict[str, Any], said: str, capsys):
    rows = [{"id": 0, "answer": "1", "completion": "x"}, {"id": 1, "completion": "x", **answer}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["--kind", "math", "--input", f"{tmp_path}/in.jsonl", "--out", f"{tmp_path}/out.jsonl"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_keep_their_digits_lists_are_all_of_them_and_solutions_are_named(tmp_path: Path, capsys) -> None:
    long = "123456789012345678901234567890"
    (tmp_path / "in.jsonl").write_text(
        rf"""{{"id": 1, "answer": {long}, "completion": "\\boxed{{{long}}}"}}
{{"id": 2, "answer": {long}, "completion": "\\boxed{{{long[:-1]}1}}"}}
{{"id": 3, "answer": 1e400, "completion": "\\boxed{{10^{{400}}}}"}}
{{"id": 4.5, "answer": ["x=5", "x=7"], "completion": "\\boxed{{7, 5}}"}}
{{"id": 5, "answer": ["x=5", "x=7"], "completion": "\\boxed{{7}}"}}
{{"id": 6, "answer": "It is 5.\\n#### 5", "completion": "\\boxed{{5}}"}}
""".replace("\\\\n", "\\n")
    )
    assert main(["--kind", "math", "--input", f"{tmp_path}/in.jsonl", "--out", f"{tmp_path}/out.jsonl"]) == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [1, 2, 3, 4.5, 5, 6]
    assert [row["score"] for row in written] == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert "No answer can meet 1 of 6 references: row 5 (a whole solution" in capsys.readouterr().err.replace("\n", "")
