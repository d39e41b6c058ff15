"""A results folder: what it belongs to, which problems are done, and what was found.

`settings.json` says which model and which settings; `<benchmark>.jsonl` are the samples; `results.json` and
`results.md` are derived from them. Nothing is written before there is a sample, so that a call that could not begin
does not claim the folder. One process at a time writes to it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prime_lightning.evaluation.runner import whole_problems
from prime_lightning.rollout.files import Row, append_rows, dumps, replace_rows, replace_text

MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.jinja")
PIECES, PIECE = 1024, 4096
"""How many pieces of a file its fingerprint reads, evenly spread, and their bytes: every large matrix gets some."""


class ResultsFolder:
    """Results of one model; refuses what was made by another, or by other settings.

    Args:
        path: Of the folder; it need not exist.
        model: What generated the completions.
        fingerprint: Of its files.

    Raises:
        ValueError: if the folder belongs to another model or process, or is no results folder.
    """

    def __init__(self, path: str, model: str, fingerprint: str) -> None:
        self.path = Path(path)
        self.settings: dict[str, Any] = {"model": model, "fingerprint": fingerprint, "benchmarks": {}}
        self._begun: dict[str, dict[int, list[Row]]] = {}
        self._held: int | None = None
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"Expected a folder for the results, got the file {path!r}. Choose another --out.")
        known = self._read("settings.json")
        if known is None:
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(
                    f"Expected a new, an empty or a results folder, got {path!r} with other files. Choose another."
                )
            return
        if known["fingerprint"] != fingerprint:
            raise ValueError(
                f"Expected a results folder of {model!r}, got {path!r}, which holds results of {known['model']!r}"
                f"{' with other weights' if known['model'] == model else ''}. Choose another --out."
            )
        self._hold()
        self.settings = self._read("settings.json") or known  # as they are when nobody else writes

    def begin(self, benchmark: str, settings: dict[str, Any], samples: int) -> dict[int, list[Row]]:
        """Take up a benchmark: returns the problems that are done already.

        Raises:
            ValueError: if it was begun with other settings.
        """
        settings = json.loads(json.dumps(settings))
        known = self.settings["benchmarks"].get(benchmark)
        if known is not None and known != settings:
            there, here = dict(_flat(known)), dict(_flat(settings))
            differing = [
                f"{name} {there.get(name)!r} there and {here.get(name)!r} here"
                for name in sorted(there.keys() | here.keys())
                if there.get(name) != here.get(name)
            ]
            raise ValueError(
                f"Expected the settings that {benchmark} was begun with in {str(self.path)!r}, got others: "
                f"{'; '.join(differing)}. Choose another --out."
            )
        self.settings["benchmarks"][benchmark] = settings
        self._begun[benchmark] = whole_problems(self.samples(benchmark), samples)
        return dict(self._begun[benchmark])

    def add(self, benchmark: str, group: Sequence[Row]) -> None:
        """Write the samples of a problem; before the first one, the settings."""
        if self._held is None:
            self._hold()
            if (self.path / "settings.json").is_file():
                raise ValueError(f"Expected {str(self.path)!r} to stay as it was, got results meanwhile. Start again.")
        done = self._begun.pop(benchmark, None)
        if done is not None:
            replace_text(self.path / "settings.json", json.dumps(self.settings, indent=2) + "\n")
            whole = (row for rows in done.values() for row in rows)  # without a problem that was cut off
            replace_rows(self.samples(benchmark), whole)
        append_rows(self.samples(benchmark), group)

    def _hold(self) -> None:
        """Keep other processes out, where the file system has locks."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._held = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError(
                f"Expected a results folder to ourselves, got {str(self.path)!r}, where another `evaluate` is at work. "
                "Wait for it, or choose another --out."
            ) from None
        except OSError:  # some network file systems have none for folders
            pass

    def close(self) -> None:
        """Let others in; a process that ends does so, too."""
        if self._held is not None:
            os.close(self._held)
        self._held = None

    def samples(self, benchmark: str) -> Path:
        """The file with the samples of a benchmark."""
        return self.path / f"{benchmark}.jsonl"

    def finish(self, benchmark: str, result: dict[str, Any]) -> None:
        """Write the numbers of a benchmark, beside those that are there."""
        results = self._read("results.json") or {"model": self.settings["model"], "benchmarks": {}}
        packages = ("torch", "transformers", "math-verify", "prime-lightning")
        results["versions"] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
        results["benchmarks"][benchmark] = result
        replace_text(self.path / "results.json", dumps(results, indent=2) + "\n")
        replace_text(self.path / "results.md", table(results))

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"Expected JSON in {str(self.path / name)!r}: {error}. Choose another --out.") from None
        return found


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table.

    Example:
        >>> numbers = {"metrics": {"accuracy": 0.5, "truncated": 0.0, "length": 9.5, "unknown": 0}}
        >>> numbers |= {"problems": 4, "samples": 1, "title": "Sums", "interval": {"accuracy": [0.15, 0.85]}}
        >>> print(table({"model": "m", "benchmarks": {"sums": numbers}}).splitlines()[-1])
        | Sums | 4 x 1 | accuracy | 50.0 | 15.0 to 85.0 | 0.0 | 10 | 0 |
    """
    lines = [
        f"Results of `{results['model']}`, in per cent; intervals of 95 % over problems (Wilson).\n",
        "| benchmark | problems x samples | metric | value | interval | truncated | mean tokens | unknown |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["benchmarks"].values():
        metrics = row["metrics"]
        cut, length = _percent(metrics["truncated"]), _percent(metrics["length"]) and f"{metrics['length']:.0f}"
        for name in [name for name in metrics if name not in ("truncated", "length", "unknown")]:
            interval = " to ".join(map(_percent, row["interval"][name]))
            cells = [row["title"], f"{row['problems']} x {row['samples']}", name, _percent(metrics[name]), interval]
            lines.append(f"| {' | '.join(cells)} | {cut} | {length} | {metrics['unknown']:.0f} |")
    lines += [
        f"\n{row['title']}: problem {number} counts as wrong, {reason}."
        for row in results["benchmarks"].values()
        for number, reason in row.get("not_asked", {}).items()
    ]
    return "\n".join(lines) + "\n"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _percent(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def fingerprint(model: str) -> str:
    """Tells models apart: a hub id is its own name, a folder the digest of its files' names, sizes and parts."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(PIECE, size // PIECES)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def file_digest(path: str | None) -> str | None:
    """SHA-256 of a file; None where there is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None
