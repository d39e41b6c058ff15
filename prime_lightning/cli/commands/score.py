"""`prime-lightning score`: rewards of tokens, steps and responses for a file of prompts with responses.

A row has a `prompt` and a `response` (or `completion`), or `responses`. The output has the same rows in the same order,
with `reward`, `step_texts`, `step_rewards`, `token_texts` and `token_rewards` added: lists of them for `responses`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from prime_lightning.cli.usage import TypedParser
from prime_lightning.models.steps import StepRule
from prime_lightning.prm.implicit import ImplicitPRM, Scored
from prime_lightning.prm.responses import Response, read_responses, without_empty

FIELDS = {
    "response": ("reward",),
    "step": ("reward", "step_texts", "step_rewards"),
    "token": ("reward", "step_texts", "step_rewards", "token_texts", "token_rewards"),
}
ROWS_AT_A_TIME = 256


def add_prm(parser: ArgumentParser) -> None:
    """The options of `ImplicitPRM.from_pretrained`, under `--prm`, and the step rule."""
    parser.add_method_arguments(ImplicitPRM, "from_pretrained", "prm")
    parser.add_argument(
        "--steps", type=StepRule | None, help="Where steps end; by default as the PRM's JSON file says."
    )


def load_prm(options: Namespace) -> ImplicitPRM:
    """The PRM that the options name."""
    return ImplicitPRM.from_pretrained(**options.prm.as_dict())


def new_file(path: Path) -> Path:
    """A file to write, which must not be there yet.

    Raises:
        ValueError: if it is.
    """
    if path.exists():
        raise ValueError(f"Expected a new file to write, got {str(path)!r}, which exists.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def score_all(prm: ImplicitPRM, responses: Sequence[Response], steps: StepRule | None) -> list[Scored]:
    """The rewards of responses from a file."""
    return prm.score(
        [one.prompt for one in responses],
        [one.text for one in responses],
        steps=steps,
        finished=[one.finished for one in responses],
    )


def parser() -> ArgumentParser:
    """Options of the command."""
    made = TypedParser(prog="prime-lightning score", description=__doc__)
    made.add_argument("--input", type=str, required=True, help="A jsonl, parquet or csv file, or a hub id.")
    made.add_argument("--output", type=Path, required=True, help="New jsonl file.")
    made.add_argument("--detail", type=Literal["response", "step", "token"], default="token", help="How much to write.")
    add_prm(made)
    return made


def main(args: list[str]) -> int:
    """Run the command."""
    command = parser()
    options = command.instantiate(command.parse_args(args))
    new_file(options.output)
    responses, rows = read_responses(options.input, labelled=False)
    without_empty(responses, options.input, drop=False)
    clash = sorted({name for row in rows for name in row} & set(FIELDS[options.detail]))
    if clash:
        raise ValueError(f"Expected rows without the columns that are to be written, got {clash} in {options.input!r}.")
    prm = load_prm(options)
    of_row: list[list[Response]] = [[] for _ in rows]
    for one in responses:
        of_row[one.row].append(one)
    total = 0.0
    with options.output.open("x", encoding="utf-8") as file:
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part = range(start, min(start + ROWS_AT_A_TIME, len(rows)))
            scored = iter(score_all(prm, [one for i in part for one in of_row[i]], options.steps))
            for i in part:
                found = [next(scored) for _ in of_row[i]]
                total += sum(one.reward for one in found)
                file.write(json.dumps({**rows[i], **columns(found, options.detail, "responses" in rows[i])}) + "\n")
    how = "with" if prm.reference else "without"
    mean = total / len(responses)
    print(f"Scored {len(responses)} responses {how} the reference, mean reward {mean:.4f}: {options.output}")
    return 0


def columns(scored: Sequence[Scored], detail: str, several: bool) -> dict[str, Any]:
    """What is added to a row."""
    table = [
        {
            "reward": one.reward,
            "step_texts": one.steps,
            "step_rewards": one.step_rewards,
            "token_texts": one.tokens,
            "token_rewards": one.token_rewards,
        }
        for one in scored
    ]
    return {name: [row[name] for row in table] if several else table[0][name] for name in FIELDS[detail]}
