"""Parsers whose errors are short: what was given, where, what comes near to it, and how to see the rest."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

import prime_lightning

UNKNOWN = re.compile(r"unrecognized arguments: --([\w.+-]+)|does not accept option '([\w.]+)'")
NESTED = re.compile(r"Problem with given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted")
KEY = re.compile(r'Parser key "([\w.]+)":\s*')
TRIED = re.compile(r"- (Problem with given class_path .*?)(?:\n\s*- |\nGiven value type: |\Z)", re.DOTALL)
GROUP_HELP = ("-h", "--help")
ITSELF = "--its-parser"
"""The argument of a command by which its parser is handed on instead of used."""
LONGEST_LINE = 300
MOST_LINES = 4  # of the parser's own words
PATHS = re.compile(r"prime_lightning(?:\.\w+)+")


class Asked(Exception):  # noqa: N818  (no error: an answer)
    """The parser of a command, for who asked for it by `ITSELF`."""

    def __init__(self, parser: Any) -> None:
        super().__init__(parser)
        self.parser = parser


class ShortErrors:
    """For a parser of `argparse` or `jsonargparse`, before it in the bases: errors of a few lines, help by group."""

    given: Sequence[str] = ()
    """The arguments that are parsed."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Parse; `--help GROUP` prints the options of one group and ends."""
        self.given = list(sys.argv[1:] if args is None else args)
        parser, words = parser_of(self, self.given)
        if words == [ITSELF]:
            raise Asked(parser)
        if len(words) == 2 and words[0] in GROUP_HELP:
            print(group_help(parser, words[1]))
            raise SystemExit(0)
        return super().parse_args(args, *rest, **options)  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print what is wrong in at most six lines and exit with 2; a parser inside another one raises."""
        if not getattr(self, "exit_on_error", True):
            return super().error(message, *([] if ex is None else [ex]))  # type: ignore[misc]
        print("\n".join(explained(self, message, self.given)), file=sys.stderr)
        raise SystemExit(2)


class Parser(ShortErrors, argparse.ArgumentParser):  # type: ignore[misc]
    """`argparse.ArgumentParser` with short errors, and no options by their first letters."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; leave what is unknown to another parser."""
        if args == [ITSELF]:
            raise Asked(self)
        return super().parse_known_args(args, namespace)


class TypedParser(ShortErrors, jsonargparse.ArgumentParser):  # type: ignore[misc]
    """The same of `jsonargparse.ArgumentParser`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})


def explained(parser: Any, message: str, given: Sequence[str]) -> Iterator[str]:
    """The lines of an error: what and where, the nearest names, how to see all.

    Args:
        parser: Whose error it is.
        message: What it says.
        given: The arguments.
    """
    bad_file = next(filter(None, map(unreadable, config_files(given))), None)
    if bad_file:
        yield f"prime-lightning: {bad_file}"
        return
    inner, _ = parser_of(parser, given)
    _, *named = inner.prog.replace(" [options]", "").split()
    command = " ".join(["prime-lightning", *named])  # whatever program calls it
    nested, unknown, key = NESTED.search(message), UNKNOWN.search(message), KEY.match(message)
    group = ""
    if nested:
        owner = key[1] if key else ""
        names, name = accepted_by(nested[1]), nested[2]
        yield f"prime-lightning: `{name}` is no option of {nested[1]}{place_of(f'{owner}.init_args.{name}', given)}."
        yield from nearest(name, names)
        return
    if unknown:
        name = unknown[1] or unknown[2]
        names, group = options_of(inner), name.split(".")[0]
        yield f"prime-lightning: `{name}` is no option of `{command}`{place_of(name, given)}."
        yield from list(nearest(name, names)) or wanting(inner, given)
    else:
        where = place_of(key[1], given) if key else ""
        words = [line.strip()[:LONGEST_LINE] for line in _bare(message).splitlines() if line.strip()]
        first = f"`{key[1]}`{where}: {words[0] if words else message}" if key else (words or [message])[0]
        yield f"prime-lightning: {first}"
        yield from words[1:MOST_LINES]
        yield from elsewhere(message)
        group = key[1].split(".")[0] if key else ""
    grouped = f" {group}" if any(name.startswith(f"{group}.") for name in options_of(inner)) else ""
    yield f"`{command} --help{grouped}` lists the options."


def _bare(message: str) -> str:
    """A parser's words without the key, the types beside a class that was meant, and the configuration behind them."""
    meant = TRIED.search(message)
    return meant[1] if meant else KEY.sub("", message, count=1).partition("\nGiven value type: ")[0]


def nearest(name: str, names: Iterable[str]) -> Iterator[str]:
    """One line with what may have been meant; if nothing is near, all names where they are few."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    last = name.split(".")[-1]
    close += [n for n in names if n.split(".")[-1] == last and n not in close][: 3 - len(close)]
    if close:
        yield f"Did you mean {' or '.join(f'`{n}`' for n in close)}?"
    elif names and len(names) <= 20:
        yield f"There are {', '.join(names)}."


def wanting(parser: Any, given: Sequence[str]) -> Iterator[str]:
    """One line with the options that have to be given and were not: one of them may have been meant."""
    flags = {word.partition("=")[0] for word in given}
    if missing := [a.option_strings[0] for a in parser._actions if a.required and flags.isdisjoint(a.option_strings)]:
        yield f"Expected {' and '.join(missing)}, got none."


def elsewhere(message: str) -> Iterator[str]:
    """For each import path that this package does not have: where what it names is, or what is near in its module."""
    for path in dict.fromkeys(PATHS.findall(message)):
        module, _, name = path.rpartition(".")
        found = homes(name)
        if found and path not in found:
            yield f"`{name}` is {' or '.join(found)}."
        elif not found and is_module(module):
            near = difflib.get_close_matches(name, getattr(import_module(module), "__all__", ()), n=3, cutoff=0.6)
            yield from [f"Did you mean {' or '.join(f'`{module}.{n}`' for n in near)}?"] if near else []


def is_module(path: str) -> bool:
    """Whether there is a module of this name."""
    try:
        return find_spec(path) is not None
    except ModuleNotFoundError:
        return False


def homes(name: str) -> list[str]:
    """Import paths of a class or function of this package, as short as they may be written.

    Example:
        >>> homes("HFEngine"), homes("VLLMEngine")
        (['prime_lightning.engines.hf.HFEngine'], ['prime_lightning.engines.vllm.VLLMEngine'])
    """
    package, definition = Path(prime_lightning.__file__).parent, re.compile(rf"^(?:class|def) {name}\b", re.MULTILINE)
    files = [file for file in sorted(package.rglob("*.py")) if definition.search(file.read_text())]
    modules = [".".join(file.relative_to(package.parent).with_suffix("").parts) for file in files]
    return [f"{shortest(module, name)}.{name}" for module in modules]


def shortest(module: str, name: str) -> str:
    """The package above a module, if it hands the name on."""
    package = module.removesuffix(".__init__").rpartition(".")[0]
    return package if name in getattr(import_module(package), "__all__", ()) else module.removesuffix(".__init__")


def options_of(parser: Any) -> list[str]:
    """The dotted names of a parser's options."""
    return [a.dest for a in parser._actions if a.option_strings and not a.dest.endswith(".help")]


def accepted_by(class_path: str) -> list[str]:
    """Names of a class's or function's parameters, and of its parents' where it hands more on to them."""
    module, _, name = class_path.rpartition(".")
    made = getattr(import_module(module), name)
    names: dict[str, None] = {}
    for one in made.__mro__ if inspect.isclass(made) else [made]:
        given = inspect.signature(one).parameters.values()
        names |= dict.fromkeys(p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if not any(p.kind is p.VAR_KEYWORD for p in given):
            break
    return list(names)


def parser_of(parser: Any, given: Sequence[str]) -> tuple[Any, list[str]]:
    """The parser of the subcommand that is asked for, and the words behind its name; else the parser and all words."""
    action = next((a for a in getattr(parser, "_actions", []) if isinstance(a.choices, dict)), None)
    for i, word in enumerate(given):
        if action is not None and word in action.choices:
            return action.choices[word], list(given[i + 1 :])
    return parser, list(given)


def group_help(parser: Any, group: str) -> str:
    """The help of the options whose names begin with `group`.

    Raises:
        SystemExit: with 2 if there are none; the groups are listed.
    """
    of_group = [a for a in parser._actions if a.dest == group or a.dest.startswith(f"{group}.")]
    if not of_group:
        groups = sorted({name.split(".")[0] for name in options_of(parser)})
        print(f"prime-lightning: no option begins with `{group}`. There are {', '.join(groups)}.", file=sys.stderr)
        raise SystemExit(2)
    whole = {grouped: grouped._group_actions for grouped in parser._action_groups}, parser.usage
    try:
        parser.usage = f"%(prog)s, options of {group}"
        for grouped in parser._action_groups:
            grouped._group_actions = [a for a in grouped._group_actions if a in of_group]
        return str(parser.format_help())
    finally:
        parser.usage = whole[1]
        for grouped, actions in whole[0].items():
            grouped._group_actions = actions


def place_of(key: str, given: Sequence[str]) -> str:
    """Where an option was given, in brackets: the command line, or a line of one of the YAML files."""
    flags = [word.partition("=")[0] for word in given]
    if f"--{key}" in flags or f"--{key.replace('.init_args.', '.')}" in flags:
        return " (on the command line)"
    for file in reversed(list(config_files(given))):
        line = line_of(key, file)
        if line is not None:
            return f" ({file}, line {line})"
    return ""


def config_files(given: Sequence[str]) -> Iterator[str]:
    """The files behind `--config`."""
    for i, word in enumerate(given):
        name, equals, value = word.partition("=")
        if name in ("-c", "--config") and (equals or i + 1 < len(given)):
            yield value if equals else given[i + 1]


def unreadable(file: str) -> str | None:
    """What is wrong with a YAML file, with its line; None if it can be read or is not there."""
    try:
        yaml.compose(Path(file).read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"Expected YAML in {file}, got what cannot be read{place}: {error.problem}."
    except OSError:
        return None
    return None


def line_of(key: str, file: str) -> int | None:
    """The line, counted from 1, on which a YAML file gives a dotted key; None if it does not."""
    try:
        node = yaml.compose(Path(file).read_text())
    except (OSError, yaml.YAMLError):
        return None
    line = None
    for part in key.split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = [(name, value) for name, value in pairs if name.value == part]
        if not found:
            return None
        line, node = found[-1][0].start_mark.line + 1, found[-1][1]
    return line
