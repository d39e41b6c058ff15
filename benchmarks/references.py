"""Feeds the reference solutions of the benchmarks to their own grader, in order and shuffled: 100 % and near 0 %.

    python benchmarks/references.py DATA            all problems; DATA has the files named below

What is not right by its own reference is listed: these problems bound every model's score.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prime_lightning.evaluation.benchmark import load_benchmark
from prime_lightning.evaluation.runner import graded
from prime_lightning.prompts.dataset import Prompts
from prime_lightning.verifiers import Verifiers

FILES = {
    "math500": "math500.jsonl",
    "aime2024": "aime2024.jsonl",
    "aime2025": "aime2025.jsonl",
    "amc2023": "amc.jsonl",
    "minerva_math": "minerva_math.jsonl",
    "olympiadbench": "olympiadbench.jsonl",
    "gsm8k": "gsm8k_test.jsonl",
    "svamp": "svamp_test.jsonl",
    "mbpp": "mbpp.jsonl",
    "mbpp_sanitized": "mbpp_sanitized.jsonl",
    "humaneval": "humaneval.jsonl",
}


def reference(prompts: Prompts, draw: int) -> str:
    """The reference as a model would hand it in: the program, the worked solution, or else the answer in a box."""
    asked = prompts.question(draw, prompts.row(draw))
    if asked.kind == "code":
        return f"```python\n{asked.row['reference_solution']}\n```"
    worked = str(asked.row.get("solution") or "")
    if "\\boxed" in worked:
        return worked
    return f"The answer is $\\boxed{{{asked.answer.strip('$')}}}$."


def scores(prompts: Prompts, verifiers: Verifiers, draws: Sequence[int], shift: int) -> Iterator[dict[str, Any]]:
    """Records of these problems, each with the reference of the one `shift` places further."""
    given = {d: [{"completion": reference(prompts, draws[(i + shift) % len(draws)])}] for i, d in enumerate(draws)}
    for group in graded(prompts, verifiers, given):
        yield group[0]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--benchmarks", nargs="*", default=list(FILES))
    options = arguments.parse_args()
    exceptions = []
    print("| benchmark | problems | right by their reference | right by another's | unknown | seconds |")
    print("|---|---|---|---|---|---|")
    for name in options.benchmarks:
        begun = time.perf_counter()
        prompts = load_benchmark(name).load(data=str(options.data / FILES[name]))
        draws = range(len(prompts))  # type: ignore[arg-type]
        with Verifiers() as verifiers:
            own = list(scores(prompts, verifiers, draws, 0))
            other = list(scores(prompts, verifiers, draws, 1))
        right, wrong = sum(r["score"] == 1.0 for r in own), sum(r["score"] == 1.0 for r in other)
        unknown = sum(r["score"] is None for r in own + other)
        seconds = time.perf_counter() - begun
        print(f"| {name} | {len(own)} | {right} | {wrong} | {unknown} | {seconds:.0f} |", flush=True)
        exceptions += [(name, r) for r in own if r["score"] != 1.0]
    for name, row in exceptions:
        print(f"- {name} {row['id']}: {row['verdict']}, {row['reason']}; answer `{row['answer']}`")


if __name__ == "__main__":
    main()
