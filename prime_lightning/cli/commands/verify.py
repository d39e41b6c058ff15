"""`prime-lightning verify`: grade the completions of a JSON-lines file.

Input rows: `{"id", "answer", "completion"}` for maths, the answer being text, a number, or a list (all of them, in any
order); `{"id", "tests" or "test" + "entry_point", "setup", "completion"}` (or any format that `code/tests.py` reads)
for code. Output rows: `{"id", "verdict", "score", "reason", "seconds"}`, in input order; the score of an unknown
verdict is null.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prime_lightning.cli.usage import TypedParser
from prime_lightning.rollout import Prompt, Verdict
from prime_lightning.rollout.files import dumps, read_rows
from prime_lightning.verifiers import CodeOptions, MathOptions, SandboxLeaks, Verifiers
from prime_lightning.verifiers.references import complaint, reference_text


def _parser() -> ArgumentParser:
    parser = TypedParser(prog="prime-lightning verify", description="Grade the completions of a JSON-lines file.")
    parser.add_argument("--kind", choices=("math", "code"), required=True, help="What the completions are.")
    parser.add_argument("--input", type=Path, required=True, help="JSON lines: id, completion, and answer or tests.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines: id, verdict, score, reason, seconds.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Worker processes.")
    parser.add_argument("--math", type=MathOptions, default=MathOptions(), help="What counts as the same answer.")
    parser.add_argument("--code", type=CodeOptions, default=CodeOptions(), help="How programs are run.")
    parser.add_argument(
        "--allow-unsafe-sandbox",
        action="store_true",
        help="Run programs even where the self-test of the sandbox finds a leak. They can then do what you can.",
    )
    return parser


def _rows(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The rows of a file; for maths, `answer` is the reference text.

    Raises:
        ValueError: A line is no object, or lacks `id`, `completion` or (maths) an answer; the message has its number.
    """
    for (where, row), (_, exact) in zip(read_rows(path), read_rows(path, parse_float=str), strict=True):
        if not isinstance(row.get("completion"), str) or "id" not in row:
            raise ValueError(f"Expected an object with `id` and a string `completion` in {where}, got {sorted(row)}.")
        yield {**row, "answer": _answer(exact, where)} if kind == "math" else row


def _answer(row: dict[str, Any], where: str) -> str:
    """The reference of a row, its numbers as they are written."""
    if "answer" not in row:
        raise ValueError(f"Expected an `answer` in {where}, got the fields {sorted(row)}. Rename the one it stands in.")
    try:
        return reference_text(row["answer"])
    except ValueError as error:
        raise ValueError(f"Expected text, a number or a list as `answer` in {where}, got {error}.") from None


def _prompt(kind: str, number: int, row: dict[str, Any]) -> Prompt:
    answer = row["answer"] if kind == "math" else ""
    return Prompt(
        draw=number, token_ids=(), text="", kind=kind, answer=answer, source=kind, row=row if kind == "code" else {}
    )


def _written(row: dict[str, Any], verdict: Verdict) -> str:
    return dumps({"id": row["id"], **verdict.to_row(), "seconds": round(verdict.seconds, 6)}) + "\n"


def _grade(arguments: Namespace, console: Console) -> Counter[str]:
    rows = partial(_rows, arguments.input, arguments.kind)
    complaints = [complaint(row["answer"]) if arguments.kind == "math" else "" for row in rows()]
    total = len(complaints)  # all of it was read, so a bad line is reported before work begins
    bad = [f"row {i} ({reason})" for i, reason in enumerate(complaints) if reason]
    if bad:
        said = f"No answer can meet {len(bad)} of {total} references: {', '.join(bad[:5])}{' ...' * (len(bad) > 5)}"
        console.print(said, markup=False, highlight=False)
    labels: Counter[str] = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Verifiers(
            workers=arguments.workers,
            math=arguments.math,
            code=arguments.code,
            allow_unsafe_sandbox=arguments.allow_unsafe_sandbox,
        ) as verifiers,
        Progress(*columns, console=console) as progress,
        arguments.out.open("w", encoding="utf-8") as output,
    ):
        bar = progress.add_task(f"Grading {arguments.kind}", total=total)
        pairs = ((_prompt(arguments.kind, i, row), row["completion"]) for i, row in enumerate(rows()))
        for row, verdict in zip(rows(), verifiers.map(pairs), strict=True):
            output.write(_written(row, verdict))
            labels[verdict.label.value] += 1
            progress.advance(bar)
    return labels


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after `prime-lightning verify`; None takes the process's.

    Returns:
        0 whatever the verdicts; 2 for input that cannot be read, or where no sandbox holds.

    Example:
        >>> main(["--kind", "math", "--input", "/nowhere.jsonl", "--out", "/nowhere.out"])
        2
    """
    parser = _parser()
    arguments = parser.instantiate(parser.parse_args(argv))
    console = Console(stderr=True)
    try:
        labels = _grade(arguments, console)
    except (OSError, ValueError, SandboxLeaks) as error:
        print(f"prime-lightning verify: {error}", file=sys.stderr)
        return 2
    console.print(", ".join(f"{count} {label}" for label, count in sorted(labels.items())) or "no rows")
    return 0
