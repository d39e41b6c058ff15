"""`prime-lightning data check TRAIN BENCHMARK...`: which training prompts stand in a benchmark.

Both are read as data, from files or from the hub; a benchmark is also the name of a shipped one. The exit status is 1
if there are any, so that a pipeline can stop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prime_lightning.cli.usage import Parser
from prime_lightning.evaluation.benchmark import benchmark_names, load_benchmark
from prime_lightning.evaluation.overlap import Index, Match
from prime_lightning.prompts.published import BenchmarkRows
from prime_lightning.prompts.rows import LOADERS, load_rows
from prime_lightning.rollout.files import replace_rows

COLUMNS = ("problem", "question", "instruction", "prompt", "text")


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    made = Parser(prog="prime-lightning data", description=__doc__)
    check = made.add_subparsers(dest="action", required=True).add_parser("check", description=__doc__)
    check.add_argument("train", help="jsonl, parquet or csv file, or hub id")
    check.add_argument("benchmarks", nargs="+", help=f"data files, benchmark YAML files, or {benchmark_names()}")
    check.add_argument("--field", help=f"column with the prompts of TRAIN; by default the first of {COLUMNS}")
    check.add_argument("--split", default="train", help="of TRAIN, where it is a hub data set")
    check.add_argument("--name", help="configuration of TRAIN, where it is a hub data set")
    check.add_argument("--n", type=int, default=8, help="words of an n-gram")
    check.add_argument("--share", type=float, default=0.5, help="of a problem's n-grams, that makes a match")
    check.add_argument("--out", help="jsonl file for the matches")
    return made


def main(args: Sequence[str]) -> int:
    """Run the command; 1 if something was found, 0 if nothing."""
    options = parser().parse_args(args)
    if options.out is not None and Path(options.out).exists():
        raise ValueError(f"Expected a new file for --out, got {options.out!r}, which exists.")
    index, sizes = Index(options.n, options.share), {}
    for name in options.benchmarks:
        texts = list(problems(name))
        sizes[Path(name).stem] = len(texts)
        index.add(Path(name).stem, texts)
    train = load_rows(options.train, split=options.split, name=options.name, revision=None)
    column = field_of(train.column_names, options.field, options.train)
    found = [match for row, value in enumerate(train[column]) for match in index.matches(row, text_of(value))]
    if options.out is not None:
        replace_rows(Path(options.out), map(asdict, found))
    print(report(options.train, len(train), sizes, found))
    return 1 if found else 0


def problems(name: str) -> Iterator[str]:
    """The problems of a data file, or of a benchmark."""
    if Path(name.removesuffix(".gz")).suffix in LOADERS:
        rows = load_rows(name, split="train", name=None, revision=None)
        yield from map(text_of, rows[field_of(rows.column_names, None, name)])
        return
    loaded = load_benchmark(name).load()
    if not isinstance(loaded, BenchmarkRows):
        raise ValueError(f"Expected a benchmark with rows, got {name!r}, whose problems are made up.")
    yield from map(text_of, loaded.rows[field_of(loaded.rows.column_names, None, name)])


def field_of(columns: Sequence[str], wanted: str | None, path: str) -> str:
    """The column with the prompts.

    Raises:
        ValueError: if there is none.
    """
    known = [name for name in ((wanted,) if wanted else COLUMNS) if name in columns]
    if not known:
        raise ValueError(
            f"Expected the column {wanted or ' or '.join(COLUMNS)} in {path!r}, got {sorted(columns)}. Set --field."
        )
    return known[0]


def text_of(value: Any) -> str:
    """A prompt as text: itself, or the user's messages of a chat.

    Example:
        >>> text_of([{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}])
        '1+1?'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return text_of(value.get("content", ""))
    messages = [message for message in value or () if isinstance(message, Mapping)]
    return "\n".join(str(message.get("content")) for message in messages if message.get("role") == "user")


def report(train: str, rows: int, sizes: Mapping[str, int], found: Sequence[Match]) -> str:
    """What was found, as a Markdown table."""
    lines = [
        f"{train}: {rows} rows, {len({match.train for match in found})} of them stand in a benchmark.\n",
        "| benchmark | problems | in the training data | equal | by n-grams | training rows |",
        "|---|---|---|---|---|---|",
    ]
    for name, size in sizes.items():
        own = [match for match in found if match.benchmark == name]
        equal = {match.problem for match in own if match.exact}
        near = {match.problem for match in own} - equal
        listed = sorted({match.train for match in own})
        some = ", ".join(map(str, listed[:10])) + (", ..." if len(listed) > 10 else "")
        lines.append(f"| {name} | {size} | {len(equal | near)} | {len(equal)} | {len(near)} | {some} |")
    return "\n".join(lines)
