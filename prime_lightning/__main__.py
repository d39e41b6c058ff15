"""The `prime-lightning` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from prime_lightning.cli import TRAINED, lightning
from prime_lightning.guests import calm
from prime_lightning.verifiers import SandboxLeaks

TRACEBACK = "PRIME_LIGHTNING_TRACEBACK"
COMMANDS = {
    "plan": ("prime_lightning.plan.command", "memory, time and cost of a run before renting GPUs"),
    "quickstart": ("prime_lightning.quickstart", "a tiny model learns arithmetic, on a CPU, in minutes"),
    "evaluate": ("prime_lightning.evaluation.command", "benchmarks of a model, or of given completions"),
    "data": ("prime_lightning.evaluation.contamination", "`check`: training prompts that stand in a benchmark"),
    "export": ("prime_lightning.prm.export", "a model of a checkpoint as a Hugging Face folder"),
    "score": ("prime_lightning.prm.score", "rewards of tokens, steps and responses by a PRM"),
    "rerank": ("prime_lightning.prm.rerank", "best of n by a PRM, against majority and pass@n"),
    "processbench": ("prime_lightning.prm.processbench", "how well a PRM finds the first wrong step"),
    "report": ("prime_lightning.report.command", "runs as one HTML file: curves, health, credit token by token"),
    "verify": ("prime_lightning.verifiers.command", "grade a file of completions"),
}
"""Commands that are no LightningCLI: the module whose `main(arguments) -> exit status` runs them, and what they do."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status: 0, or 2 if what the user gave cannot work or the run had to stop."""
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(usage())
        return 0
    calm()
    try:
        return _run(command, arguments[1:])
    except (ValueError, OSError, FloatingPointError, MisconfigurationException, SandboxLeaks) as error:
        if os.environ.get(TRACEBACK):
            raise
        return _complain(error)
    except OmegaConfBaseException as error:
        return _complain(f"A ${{...}} in the configuration leads nowhere: {error}")


def usage() -> str:
    """What `prime-lightning --help` prints."""
    lines = {
        "fit --config FILE": "train by PRIME",
        **{f"{name} --config FILE": what for name, (_, _, what) in TRAINED.items()},
        "validate | test | predict": "sample, grade, score",
        **{f"{name} ...": what for name, (_, what) in COMMANDS.items()},
    }
    listed = "\n".join(f"  prime-lightning {command:<28} {what}" for command, what in lines.items())
    return (
        "prime-lightning: train reasoning models with PRIME\n\n"
        f"{listed}\n\n`prime-lightning COMMAND --help` lists the options of a command."
    )


def _run(command: str, rest: list[str]) -> int:
    if command in COMMANDS:
        main_of: Callable[[list[str]], int] = import_module(COMMANDS[command][0]).main
        return main_of(rest)
    known = ["fit", "validate", "test", "predict", *TRAINED, *COMMANDS]
    if command not in known and not command.startswith("-"):
        raise ValueError(f"Expected a command of {', '.join(known)}, got {command!r}.")
    lightning([command, *rest])
    return 0


def _complain(error: Any) -> int:
    words, _, _ = str(error).partition("\nGiven value type: ")  # jsonargparse then prints the whole configuration
    print(f"prime-lightning: {words}\n({TRACEBACK}=1 shows where it comes from.)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
