"""`prime-lightning report`: runs as one HTML file that needs no network; `--watch` writes it again as they go on."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from prime_lightning.cli.usage import Parser
from prime_lightning.report.page import write_report
from prime_lightning.report.runs import files_of

Signature = list[tuple[str, int, int]]


def main(args: Sequence[str]) -> int:
    """Write the report, and go on writing it with `--watch`."""
    options = parser().parse_args(args)
    out = Path(options.out or (Path(options.runs[0]) / "report.html" if len(options.runs) == 1 else "report.html"))
    if out.is_dir():
        raise IsADirectoryError(f"Expected a file for --out, got the folder {str(out)!r}.")
    if options.watch is None:
        print(f"Report: {write_report(options.runs, out)}")
        return 0
    if not options.watch > 0:
        raise ValueError(f"Expected --watch with a positive number of seconds, got {options.watch}.")
    print(f"Report: {out}, written again when the runs go on; Ctrl-C ends it.", flush=True)
    try:
        watch(options.runs, out, options.watch)
    except KeyboardInterrupt:
        write_report(options.runs, out)  # a page that stays
    return 0


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    made = Parser(prog="prime-lightning report", description=__doc__)
    made.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (its trainer.default_root_dir)")
    made.add_argument("--out", metavar="FILE", help="default: report.html in the run, or here for several runs")
    made.add_argument(
        "--watch", nargs="?", type=float, const=10.0, metavar="SECONDS", help="look for new data that often (10)"
    )
    return made


def watch(runs: Sequence[str], out: Path, seconds: float, *, rounds: int | None = None) -> int:
    """Write the report whenever a file of a run has changed; returns how often it was written.

    Args:
        runs: Run folders; one that holds nothing yet is waited for.
        out: The report.
        seconds: Between two looks.
        rounds: Looks before it ends; None for no end.
    """
    seen: list[Signature] = []
    waiting: list[str] = []
    written = looks = 0
    while rounds is None or looks < rounds:
        looks += 1
        found = [signature(run) for run in runs]
        empty = [run for run, files in zip(runs, found, strict=True) if not files]
        if empty and empty != waiting:
            print(f"Waiting for the first data of {', '.join(empty)}.", flush=True)
        elif not empty and found != seen:
            write_report(runs, out, reload=max(5, round(seconds)))
            written += 1
        seen, waiting = found, empty
        time.sleep(seconds)
    return written


def signature(run: str) -> Signature:
    """Names, sizes and times of the files of a run that a report reads."""
    states = [(path, path.stat()) for path in files_of(Path(run))]
    return [(str(path), state.st_size, state.st_mtime_ns) for path, state in states]
