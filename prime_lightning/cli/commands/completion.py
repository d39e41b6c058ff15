"""`prime-lightning completion bash|zsh`: prints what the shell completes commands, options and files by.

prime-lightning completion bash > ~/.local/share/bash-completion/completions/prime-lightning
prime-lightning completion zsh > ~/.zfunc/_prime-lightning      where `fpath+=~/.zfunc` stands before `compinit`
"""

from __future__ import annotations

import argparse
import enum
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import shtab

from prime_lightning.cli.commands import COMMANDS, LIGHTNING, runner
from prime_lightning.cli.usage import ITSELF, Asked, Parser
from prime_lightning.evaluation.benchmark import benchmark_names

TAKES_OPTIONS_OF = {"plan": "fit"}


def main(args: Sequence[str]) -> int:
    """Print the script."""
    options = parser().parse_args(args)
    print(shtab.complete(whole(), options.shell))
    return 0


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    made = Parser(
        prog="prime-lightning completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("shell", choices=["bash", "zsh"])
    return made


def whole() -> argparse.ArgumentParser:
    """One parser with all commands, and their options, as `argparse` knows them."""
    made = argparse.ArgumentParser("prime-lightning")
    made.add_argument("--version", action="store_true", help="of all that it stands on")
    below = made.add_subparsers()
    described = LIGHTNING | {name: what for name, (_, what) in COMMANDS.items()}
    for name, what in described.items():
        inner = below.add_parser(name, help=what, add_help=False, conflict_handler="resolve")
        if name in TAKES_OPTIONS_OF:
            copy(parser_of(TAKES_OPTIONS_OF[name]), inner)
        copy(parser_of(name), inner)
    return made


def parser_of(command: str) -> Any:
    """A command's own parser."""
    try:
        runner(command)([ITSELF])
    except Asked as asked:
        return asked.parser
    raise RuntimeError(f"`{command}` has no parser.")


def copy(parser: Any, into: argparse.ArgumentParser) -> None:
    """Give a parser what another one, of any kind, takes: names, values where they are few, else files."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            below = into.add_subparsers()
            for name, inner in action.choices.items():
                copy(inner, below.add_parser(name, help=name, add_help=False))  # without a help it would be hidden
            continue
        shown: dict[str, Any] = {"help": str(action.help or "").split("\n")[0].replace("%", "%%")}
        if action.nargs == 0:
            into.add_argument(*action.option_strings, action="store_true", **shown)
            continue
        values = list(values_of(action))
        given: dict[str, Any] = {"choices": values} if values else {}
        made = into.add_argument(*(action.option_strings or [action.dest]), nargs=action.nargs, **given, **shown)
        if not values:
            made.complete = shtab.FILE  # type: ignore[attr-defined]


def values_of(action: Any) -> Iterator[str]:
    """What an option may be, if that can be listed."""
    if action.dest == "benchmark":
        yield from benchmark_names()
    elif action.choices:
        yield from map(str, action.choices)
    else:
        yield from named_in(getattr(action, "_typehint", None))


def named_in(kind: Any) -> Iterator[str]:
    """The values that a type names.

    Example:
        >>> list(named_in(Literal["mean", "sum"] | bool | None))
        ['mean', 'sum', 'true', 'false']
    """
    if kind is bool:
        yield from ("true", "false")
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        yield from kind.__members__
    elif get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif get_origin(kind) in (Union, UnionType):
        for inner in get_args(kind):
            yield from named_in(inner)
