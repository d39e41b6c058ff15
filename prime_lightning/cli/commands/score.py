"""`prime-lightning score`: rewards of tokens, steps and responses for a file of prompts with responses.

A row has a `prompt` and a `response` (or `completion`), or `responses`. The output has the same rows in the same order,
with `reward`, `step_texts`, `step_rewards`, `token_texts` and `token_rewards` added: lists of them for `responses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from prime_lightning.cli.usage import TypedParser
from prime_lightning.models.steps import StepRule
from prime_lightning.prm.implicit import ImplicitPRM, Scored
from prime_lightning.prm.responses import read_rollouts, without_empty
from prime_lightning.rollout import Rollout
from prime_lightning.rollout.files import append_rows

RESPONSE = {"reward": "reward"}
STEP = RESPONSE | {"step_texts": "steps", "step_rewards": "step_rewards"}
TOKEN = STEP | {"token_texts": "tokens", "token_rewards": "token_rewards"}
FIELDS = {"response": RESPONSE, "step": STEP, "token": TOKEN}
"""By `--detail`: what is written, and as what `Scored` has it."""
ROWS_AT_A_TIME = 256


def prm_parser(command: str, description: str | None, *, reads: str, writes: str, must: bool = True) -> ArgumentParser:
    """The options of all commands that judge responses by a PRM: `--input`, `--out`, and `--prm`, from where it is.

    Args:
        command: Its name.
        description: For its help.
        reads: What `--input` is.
        writes: What `--out` is.
        must: Whether there has to be an `--input`.
    """
    made = TypedParser(prog=f"prime-lightning {command}", description=description)
    made.add_argument("--input", type=str if must else str | None, required=must, help=reads)
    made.add_argument("--out", type=Path, required=True, help=writes)
    made.add_method_arguments(ImplicitPRM, "from_pretrained", "prm")
    return made


def add_steps(parser: ArgumentParser) -> None:
    """The option that says where steps end."""
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


def score_all(prm: ImplicitPRM, rollouts: Sequence[Rollout], steps: StepRule | None) -> list[Scored]:
    """The rewards of rollouts, whose texts are tokenized anew."""
    return prm.score(
        [one.prompt.messages or one.prompt.text for one in rollouts],
        [one.completion.text for one in rollouts],
        steps=steps,
        finished=[not one.completion.truncated for one in rollouts],
    )


def parser() -> ArgumentParser:
    """Options of the command."""
    reads, writes = "A jsonl, parquet or csv file, or a hub id.", "New jsonl file."
    made = prm_parser("score", __doc__, reads=reads, writes=writes)
    made.add_argument("--detail", type=Literal["response", "step", "token"], default="token", help="How much to write.")
    add_steps(made)
    return made


def main(args: list[str]) -> int:
    """Run the command."""
    command = parser()
    options = command.instantiate(command.parse_args(args))
    new_file(options.out)
    rows = read_rollouts(options.input, labelled=False)
    count = len(without_empty(rows, options.input, drop=False))
    clash = sorted({name for row, _ in rows for name in row} & FIELDS[options.detail].keys())
    if clash:
        raise ValueError(f"Expected rows without the columns that are to be written, got {clash} in {options.input!r}.")
    prm = load_prm(options)
    total = 0.0
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = rows[start : start + ROWS_AT_A_TIME]
        scored = score_all(prm, [one for _, rollouts in part for one in rollouts], options.steps)
        total += sum(one.reward for one in scored)
        rest = iter(scored)
        of_row = [(row, list(islice(rest, len(rollouts)))) for row, rollouts in part]
        written = (row | columns(found, options.detail, several="responses" in row) for row, found in of_row)
        append_rows(options.out, written)
    how = "with" if prm.reference else "without"
    mean = total / count
    print(f"Scored {count} responses {how} the reference, mean reward {mean:.4f}: {options.out}")
    return 0


def columns(scored: Sequence[Scored], detail: str, several: bool) -> dict[str, Any]:
    """What is added to a row."""
    return {
        column: [getattr(one, field) for one in scored] if several else getattr(scored[0], field)
        for column, field in FIELDS[detail].items()
    }
