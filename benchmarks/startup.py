"""How long a command takes to begin: seconds of a process, beside those of a Python that imports torch alone.

    python benchmarks/startup.py
    python benchmarks/startup.py --turns 9 --out startup.json

The commands take turns, so that a busy machine slows all of them alike. Each is run once before, so that its files are
compiled, unless PYTHONDONTWRITEBYTECODE forbids it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CONF = Path(__file__).parents[1] / "conf"
OURS = [sys.executable, "-m", "prime_lightning"]
COMMANDS = {
    "python -c 'import torch'": ([sys.executable, "-c", "import torch"], 0),
    "--help": ([*OURS, "--help"], 0),
    "--version": ([*OURS, "--version"], 0),
    "fitt, a misspelt command": ([*OURS, "fitt"], 2),
    "plan --help": ([*OURS, "plan", "--help"], 0),
    "fit --print_config": ([*OURS, "fit", "--config", str(CONF / "quickstart.yaml"), "--print_config"], 0),
}


def main(args: Sequence[str] | None = None) -> None:
    options = parser().parse_args(args)
    for name in COMMANDS:
        seconds_of(name)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.turns):
        for name, taken in seconds.items():
            taken.append(seconds_of(name))
    print("| command | median s | least | most |\n|---|---|---|---|")
    for name, taken in seconds.items():
        print(f"| `{name}` | {statistics.median(taken):.2f} | {min(taken):.2f} | {max(taken):.2f} |")
    if options.out:
        Path(options.out).write_text(json.dumps(seconds, indent=2))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--turns", type=int, default=5)
    made.add_argument("--out", help="a JSON file")
    return made


def seconds_of(name: str) -> float:
    """Of one process, from its start to its end.

    Raises:
        RuntimeError: if it ends otherwise than it should.
    """
    command, expected = COMMANDS[name]
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if ended.returncode != expected:
        raise RuntimeError(f"Expected {expected} from `{name}`, got {ended.returncode}: {ended.stderr[-1000:]}")
    return seconds


if __name__ == "__main__":
    main()
