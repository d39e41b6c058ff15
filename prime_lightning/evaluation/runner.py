"""Runs a benchmark: problems -> engine -> verifiers -> samples -> numbers; or grades completions made elsewhere.

Samples are rows of rollouts, each with its number `sample`, written problem by problem; a file that a crash cut off
loses its last problem and nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prime_lightning.evaluation.table import ProblemTable, problem_values
from prime_lightning.prompts.dataset import Prompts
from prime_lightning.rollout import Completion, Group, Prompt, Rollout, Sampling, Verdict
from prime_lightning.rollout.files import Row, read_rows, whole_rows
from prime_lightning.sampling.acceptance import Tally
from prime_lightning.sampling.loader import RolloutSource, Round
from prime_lightning.verifiers import Verifiers

NOT_ASKED = "not asked: "
"""How the reason of a sample begins that the engine could not draw."""


def sample_rows(group: Group) -> list[Row]:
    """The samples of one problem."""
    return [{**rollout.to_row(), "sample": sample} for sample, rollout in enumerate(group)]


def too_long(prompt: Prompt, samples: int, room: float) -> list[Row]:
    """The samples of a problem whose prompt does not fit the engine's context: none, and each counts as wrong."""
    reason = f"{NOT_ASKED}its prompt has {len(prompt.token_ids)} tokens, and the engine has room for {room}"
    nothing = Completion(text="", token_ids=[], logprobs=[], finish=None, versions=[])
    rollout = Rollout(prompt=prompt, completion=nothing, verdict=Verdict.of_score(0.0, reason=reason))
    return sample_rows([rollout] * samples)


def is_asked(row: Mapping[str, Any]) -> bool:
    """Whether the engine was given the problem of a sample."""
    return not str(row.get("reason", "")).startswith(NOT_ASKED)


def whole_problems(path: Path, samples: int) -> dict[int, list[Row]]:
    """The problems of a file that have all of their samples, in the order of the file.

    Those that did not fit an engine's context are asked anew: it may be another one by now.

    Raises:
        ValueError: if a row is no sample.
    """
    groups: dict[int, list[Row]] = {}
    for number, row in enumerate(whole_rows(path), 1):
        rollout = Rollout.from_row(row, f"row {number} of {str(path)!r}")
        if is_asked(row):
            groups.setdefault(rollout.prompt.draw, []).append({**rollout.to_row(), "sample": row.get("sample")})
    return {draw: rows for draw, rows in groups.items() if len(rows) == samples}


NOTHING: Row = {"completion": "", "score": None, "length": None, "finish": None}
READ = ("completion", "response", "length", "tokens", "finish")
"""What is read of completions made elsewhere, beside the problem."""


class Scores:
    """The numbers of one benchmark, added up problem by problem, over all ranks.

    Args:
        metrics: Names of `evaluate` modules.
        samples: K of each problem.
        kind: Verifier of the problems.
        answer: Where answers of maths stand.
        device: Where the ranks exchange them.
    """

    def __init__(
        self, metrics: Sequence[str], samples: int, kind: str, answer: str, device: torch.device | str = "cpu"
    ) -> None:
        from prime_lightning.evaluation.metrics import load_metric  # here, because it brings data sets and pandas

        self.metrics = [load_metric(name, kind, answer) for name in metrics]
        self.names = list(problem_values(self.metrics, [NOTHING] * samples))
        self.table = ProblemTable(self.names, samples).to(device)

    def add(self, group: Sequence[Row]) -> None:
        """Add the samples of one problem."""
        self.table.update(problem_values(self.metrics, group))

    def result(self) -> dict[str, Any]:
        """`problems`, `metrics`, `stderr`, `interval`: see `ProblemTable`."""
        found: dict[str, Any] = self.table.compute()
        return found


def sampled(prompts: Prompts, source: RolloutSource, sampling: Sampling, draws: Iterable[int]) -> Iterator[list[Row]]:
    """Sample and grade these problems; yields the samples of each as soon as those before it are done.

    A problem that does not fit the engine's context beside `max_tokens` is wrong.

    Raises:
        ValueError: if no problem would, or the tokenizer has no chat template.
    """
    problems = [prompts.prompt(draw, source.tokenizer) for draw in draws]
    if not problems:
        return
    room = source.longest_prompt(sampling)
    with source.lock:
        groups = Round(source, [p for p in problems if len(p.token_ids) <= room], sampling, Tally())
        graded = iter(groups)
        try:
            for problem in problems:
                fits = len(problem.token_ids) <= room
                yield sample_rows(next(graded)) if fits else too_long(problem, sampling.samples, room)
        finally:
            groups.close()


def not_asked(title: str, groups: Iterable[Sequence[Row]]) -> dict[str, str]:
    """Numbers of the problems that could not be asked, with the reason; a warning says that they count as wrong."""
    found = {str(group[0]["draw"]): group[0]["reason"] for group in groups if not is_asked(group[0])}
    if found:
        listed = "; ".join(f"problem {number} {reason}" for number, reason in [*found.items()][:3])
        warnings.warn(f"{len(found)} problems of {title} count as wrong: {listed}.", stacklevel=2)
    return found


def graded(
    prompts: Prompts, verifiers: Verifiers, completions: Mapping[int, Sequence[Mapping[str, Any]]]
) -> Iterator[list[Row]]:
    """Grade completions that are there already: rows of rollouts, whose verdicts are not looked at."""
    asked = {draw: prompts.question(draw, prompts.row(draw)) for draw in completions}
    pairs = ((asked[draw], row["completion"]) for draw, rows in completions.items() for row in rows)
    verdicts = verifiers.map(pairs)
    for draw, rows in completions.items():
        given = [Rollout.from_row(row, f"a completion of problem {draw}") for row in rows]
        yield sample_rows(
            [replace(one, prompt=asked[draw], verdict=said) for one, said in zip(given, verdicts, strict=False)]
        )


def read_completions(path: str, prompts: Prompts, problems: int, rows: int) -> dict[int, list[Row]]:
    """Completions made elsewhere, by problem, in the order of the problems.

    A row has `completion`, and `id` (of the problem's row) or `draw` (its position, from 0). Several rows of one
    problem are its samples. Other keys are ignored, and rows of later problems than the first `problems` of all `rows`.

    Raises:
        ValueError: if a line is no row or none of this benchmark, or problems have none or unequal numbers of
            completions.
    """
    positions = {str(prompts.row(i).get("id", i)): i for i in range(rows)}
    found: dict[int, list[Row]] = {i: [] for i in range(rows)}
    for where, row in read_rows(path):
        known = {key: row[key] for key in READ if key in row}
        Rollout.from_row(known, where)
        place = positions.get(str(row["id"])) if "id" in row else row.get("draw", row.get("problem"))
        if type(place) is not int or place not in found:
            named = {key: row[key] for key in ("id", "draw", "problem") if key in row} or f"the keys {sorted(row)}"
            raise ValueError(f"Expected `id` or `draw` (0 to {rows - 1}) of {prompts.source} in {where}, got {named}.")
        found[place].append(known)
    asked = {place: found[place] for place in range(problems)}
    counts = {len(samples) for samples in asked.values()}
    if len(counts) != 1 or counts == {0}:
        few = [i for i, samples in asked.items() if len(samples) != max(counts)]
        raise ValueError(
            f"Expected equally many completions of each of the {problems} problems of {prompts.source} in {path!r}, "
            f"got {min(counts)} to {max(counts)}"
            + (f"; problems {few[:5]} ... have fewer." if few else ": none.")
            + " `limit` grades the first problems only."
        )
    return asked


def all_empty(groups: Iterable[Sequence[Row]]) -> bool:
    """Whether completions were drawn and none has any text: the model produced nothing but its end token."""
    drawn = [row["completion"] for group in groups for row in group if is_asked(row)]
    return bool(drawn) and not any(text.strip() for text in drawn)
