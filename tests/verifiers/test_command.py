"""`prime-lightning verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prime_lightning.verifiers.command import main

from .conftest import TIERS


def run(tmp_path: Path, kind: str, rows: list[dict[str, Any]], *more: str) -> tuple[int, list[dict[str, Any]]]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--kind", kind, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), *more]
    code = main(arguments)
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    return code, [json.loads(line) for line in written]


def test_maths(tmp_path: Path, leaves_nothing: None) -> None:
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
def test_code(tmp_path: Path, leaves_nothing: None) -> None:
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
    arguments = ["--kind", "math", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 2
    assert "line 2" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_no_rows(tmp_path: Path) -> None:
    assert run(tmp_path, "math", []) == (0, [])
