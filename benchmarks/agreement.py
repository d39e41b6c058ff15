"""How often the maths verifier says what people said: agreement and false positives of each value of `math.answer`.

    python benchmarks/agreement.py --completions FILE [--pairs FILE] [--workers 2] [--json FILE] [--show 20]

`--completions`: JSON lines with `gold`, `completion`, `right`, and `dataset` to group by. `--pairs`: JSON lines with
`gold`, `prediction`, `expected`, and `gold_kind`, `pred_kind`: `answer` is put into a box, `text` is read as a
completion is.
A false positive is graded right and is not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prime_lightning.rollout import Prompt
from prime_lightning.verifiers import MathOptions, Verifiers
from prime_lightning.verifiers.maths.final import stated
from prime_lightning.verifiers.maths.text import boxes

PLACES = ("boxed", "final", "anywhere")


@dataclass(frozen=True)
class Item:
    """A completion and what is known about it."""

    group: str
    reference: str
    text: str
    right: bool


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from map(json.loads, file)


def completions(path: Path) -> Iterator[Item]:
    for row in lines(path):
        yield Item(row["dataset"], row["gold"], row["completion"], row["right"])


def pairs(path: Path) -> Iterator[Item]:
    for row in lines(path):
        text = row["prediction"] if row["pred_kind"] == "text" else rf"\boxed{{{row['prediction']}}}"
        reference = row["gold"] if row["gold_kind"] == "answer" else read(row["gold"])
        yield Item("pairs", reference, text, row["expected"])


def read(text: str) -> str:
    """The reference in a text: its boxes, else what it states, else the formulas in it, else all of it."""
    found = ", ".join(boxes(text)) or stated(text)
    if found:
        return found
    formulas = [next(filter(None, found)) for found in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.DOTALL)]
    return ", ".join(formulas) or text


def grade(items: list[Item], place: str, workers: int) -> list[bool]:
    prompts = [Prompt(draw=0, token_ids=(), text="", kind="math", answer=item.reference) for item in items]
    with Verifiers(workers=workers, math=MathOptions(answer=place)) as verifiers:
        verdicts = verifiers.map((prompt, item.text) for prompt, item in zip(prompts, items, strict=True))
        return [verdict.score == 1.0 for verdict in verdicts]


def summary(items: list[Item], said: list[bool]) -> dict[str, dict[str, float]]:
    """Numbers of each group, of all, and of those with and without a box."""
    groups: dict[str, list[tuple[Item, bool]]] = {}
    for item, verdict in zip(items, said, strict=True):
        box = "\\boxed" in item.text
        for name in (item.group, "all", "with a box" if box else "without a box"):
            groups.setdefault(name, []).append((item, verdict))
    return {
        name: {
            "items": len(found),
            "agreement": sum(item.right == verdict for item, verdict in found) / len(found),
            "false_positives": sum(verdict and not item.right for item, verdict in found),
            "false_negatives": sum(item.right and not verdict for item, verdict in found),
        }
        for name, found in sorted(groups.items())
    }


def shown(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> Table:
    table = Table("answer", "of", "items", "agreement", "false positives", "false negatives")
    for place, sources in results.items():
        for source, groups in sources.items():
            for name, row in groups.items():
                counts = (str(row[key]) for key in ("false_positives", "false_negatives"))
                table.add_row(place, f"{source}: {name}", str(row["items"]), f"{row['agreement']:.2%}", *counts)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--answer", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", type=int, default=0, help="Disagreements to print of each.")
    arguments = parser.parse_args()
    sources = {
        "completions": list(completions(arguments.completions)) if arguments.completions else [],
        "pairs": list(pairs(arguments.pairs)) if arguments.pairs else [],
    }
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for place in arguments.answer:
        results[place] = {}
        for source, items in sources.items():
            said = grade(items, place, arguments.workers)
            results[place][source] = summary(items, said)
            off = [(item, verdict) for item, verdict in zip(items, said, strict=True) if item.right != verdict]
            for item, verdict in off[: arguments.show]:
                print(place, item.group, "said", verdict, repr(item.reference), "<<>>", repr(item.text[-200:]))
    Console(width=120).print(shown(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
