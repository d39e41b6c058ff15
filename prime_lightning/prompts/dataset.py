"""Rows of a data set -> `Prompt`s, in an endless seeded order in which a position is one integer.

`prompts.prompt(draw, tokenizer)` is the draw-th prompt of the run. Nothing else has to be saved to resume, and nothing
depends on how fast rows are consumed. `rows.py` reads the files, and `template.py` makes rows into prompts.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prime_lightning.prompts.rows import check_filled, load_rows, missing_rows
from prime_lightning.prompts.template import CODE_USER, MATHS_USER, Template, at, messages_of, renamed
from prime_lightning.rollout import Prompt
from prime_lightning.verifiers.references import boxed, reference_text

__all__ = [
    "CODE_USER",
    "MATHS_USER",
    "DatasetPrompts",
    "MixedPrompts",
    "Prompts",
    "Template",
    "load_rows",
    "permutation",
]
OURS = ("math", "exact")
"""Kinds that compare an answer with a reference."""
TALKS = ("prompt", "messages", "conversations")
"""Columns that are taken as chat messages, where they hold such and there is no `problem`."""
BOXED = "boxed"
"""The `answer_pattern` that takes the last box."""


class Prompts(ABC):
    """An endless order of prompts. Subclasses say what the draw-th row is and how rows become prompts."""

    source: str
    kind: str
    template: Template

    @abstractmethod
    def row(self, draw: int) -> Mapping[str, Any]:
        """The row at this position of the order."""

    def parts(self) -> list[Prompts]:
        """The sources that this one consists of; itself, if it is a single one."""
        return [self]

    def references(self) -> Iterator[Prompt]:
        """One prompt a row of a finite source, untokenized, for checking the reference answers; none otherwise."""
        return iter(())

    def keep(self, rows: Sequence[int]) -> None:  # noqa: B027 - an endless source has no rows to leave out
        """Leave all other rows of a finite source out."""

    def place(self, draw: int) -> int:
        """Which problem this draw is, in a source that comes back to its problems."""
        return draw

    def wanted(self, draw: int) -> bool:
        """Whether this draw is sampled, as far as is known by now; the others are passed over."""
        return True

    def learn(self, draw: int, outcomes: Sequence[float]) -> None:  # noqa: B027 - most orders do not depend on it
        """Take note of the known outcomes of a group."""

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on besides the position."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most orders have no state
        """Take up that state."""

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """The reference answer of this row."""
        answer = row.get("answer")
        return "" if answer is None else str(answer)

    def hidden(self) -> tuple[str, ...]:
        """Fields, or paths of such, that hold the reference, which no template shows unasked."""
        return ("answer",)

    def kind_of(self, row: Mapping[str, Any]) -> str:
        """Which verifier grades this row."""
        return self.kind

    def prompt(self, draw: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The prompt at this position, tokenized."""
        row = self.row(draw)
        text, token_ids = self.template.encode(row, tokenizer, self.hidden())
        return self.question(draw, row, text, token_ids)

    def question(self, draw: int, row: Mapping[str, Any], text: str = "", ids: tuple[int, ...] = ()) -> Prompt:
        """A row as its verifier needs it; untokenized, unless text and token ids are given."""
        return Prompt(
            draw=draw,
            token_ids=ids,
            text=text,
            kind=self.kind_of(row),
            answer=self.answer_of(row),
            source=self.source,
            row=row,
        )


class DatasetPrompts(Prompts):
    """The rows of a file or of a hub data set, each pass in a new seeded order.

    Args:
        path: A jsonl, parquet or csv file (`.gz` too), a list of such files, or a hub id.
        kind: Verifier of these rows: `math`, `code`, `exact`, or the import path of a function.
        template: How a row becomes text.
        split: Split of a hub data set.
        name: Configuration of a hub data set.
        revision: Commit of a hub data set; pin it, since data sets change.
        columns: What these rows call otherwise, `{answer: solution}`: our name, and theirs or a path
            (`reward_model.ground_truth`). Every row needs an `answer`, but for `code`; a list of answers means all of
            them, in any order.
        answer_pattern: Regular expression whose first group is the answer in what its column says; `boxed` takes the
            last box, and None all of it.
        source: Name for counts per source; by default the file's or data set's name.
        shuffle: Permute each pass; False keeps the file's order.
        seed: Of the permutation.
        limit: Only the first rows; None takes all.
        drop_unanswered: Leave rows out that have no answer, or none that the pattern finds, instead of an error.

    Raises:
        ValueError: if the data set is missing, empty, or has a row without a problem or an answer.
    """

    def __init__(
        self,
        path: str | list[str],
        kind: str = "math",
        template: Template | None = None,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        columns: dict[str, str] | None = None,
        answer_pattern: str | None = None,
        source: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        limit: int | None = None,
        drop_unanswered: bool = False,
    ) -> None:
        self.kind, self.shuffle, self.seed = kind, shuffle, seed
        self.columns, self.answer_pattern = columns or {}, answer_pattern
        first = path if isinstance(path, str) else path[0]
        self.source = source or Path(first.removesuffix(".gz")).stem
        self.rows = load_rows(path, split=split, name=name, revision=revision, exact=self.answer)
        if limit is not None:
            self.rows = self.rows.select(range(min(limit, len(self.rows))))
        self.template = template or self._usual_template()
        self._check(first, drop=drop_unanswered)

    @property
    def answer(self) -> str:
        """Column of the answer, or its path."""
        return self.columns.get("answer", "answer")

    def _usual_template(self) -> Template:
        """That of PRIME's authors; the messages themselves, where rows have a `prompt` of messages and no `problem`."""
        if "problem" not in {*self.rows.column_names, *self.columns} and len(self.rows):
            talks = (name for name in TALKS if messages_of(self.rows[0].get(name)))
            for name in talks:
                return Template(user=f"{{{name}}}")
        return Template(user=CODE_USER if self.kind == "code" else MATHS_USER)

    def _check(self, path: str, *, drop: bool = False) -> None:
        if len(self.rows) == 0:
            raise ValueError(f"Expected at least one row in {path!r}, got an empty data set.")
        if self.kind != "code":
            self._check_answers(path, drop)
        self._check_template(path)

    def _check_template(self, path: str) -> None:
        """Every row must give a prompt, and no prompt the answer."""
        row = self.flat(self.rows[0])
        names = dict.fromkeys(self.template.fields(row))
        for name in names:
            option = "columns" if name in self.columns else "template.user"
            check_filled(self.rows, self.columns.get(name, name), path, option=option, blank=len(names) > 1)
        self.template.messages(row, self.hidden())
        if strangers := self.template.strangers(row):
            warnings.warn(
                f"{strangers} in the template of {path!r} are no fields of its rows and stand for themselves; "
                "double the braces if this is meant.",
                stacklevel=2,
            )

    def _check_answers(self, path: str, drop: bool) -> None:
        """Every row must have an answer, or is left out."""
        missing = missing_rows(self.rows, self.answer)
        if missing is None or (missing and not drop):
            check_filled(self.rows, self.answer, path, option="columns")
        bad = dict.fromkeys(missing or (), "no answer")
        for i, row in enumerate(self.rows.select_columns(self._answer_columns())):
            if i not in bad and (reason := self._unread(row)):
                bad[i] = reason
        if not bad:
            return
        named = ", ".join(f"row {i}: {reason}" for i, reason in list(bad.items())[:5])
        said = f"in {len(bad)} of {len(self.rows)} rows of {path!r} (counted from 0; {named}{' ...' * (len(bad) > 5)})"
        if not drop or len(bad) == len(self.rows):
            raise ValueError(
                f"Expected an answer in `{self.answer}`, got none {said}. Set `columns` or "
                "`answer_pattern`, or leave these rows out with `drop_unanswered: true`."
            )
        warnings.warn(f"Left out, for want of an answer: {said}.", stacklevel=2)
        self.keep([i for i in range(len(self.rows)) if i not in bad])

    def _answer_columns(self) -> list[str]:
        names = self.rows.column_names
        return [self.answer if self.answer in names else re.split(r"[.\[]", self.answer)[0]]

    def _unread(self, row: Mapping[str, Any]) -> str:
        """Why a row has no answer; empty if it has one."""
        try:
            self.answer_of(row)
        except ValueError as error:
            return str(error)
        return ""

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """The answer, or what the pattern finds in it.

        A verifier of one's own gets a mapping as JSON text.

        Raises:
            ValueError: if it is no answer, or the pattern does not find one.
        """
        try:
            answer = at(row, self.answer)
        except KeyError:
            return ""
        if isinstance(answer, Mapping) and self.kind not in OURS:
            return json.dumps(answer)
        text = "" if answer is None and self.kind == "code" else reference_text(answer)
        if self.answer_pattern is None:
            return text
        found = boxed(text) if self.answer_pattern == BOXED else _first_group(self.answer_pattern, text)
        if not found:
            raise ValueError(f"nothing that matches `answer_pattern` {self.answer_pattern!r} in {text[-80:]!r}")
        return found

    def hidden(self) -> tuple[str, ...]:
        """The answer's column; and `answer`, whatever it is called."""
        return tuple(dict.fromkeys((self.answer, "answer")))

    def references(self) -> Iterator[Prompt]:
        """All rows in the order of the file."""
        return (self.question(i, self.flat(self.rows[i])) for i in range(len(self.rows)))

    def keep(self, rows: Sequence[int]) -> None:
        """Leave all other rows out."""
        self.rows = self.rows.select(rows)

    def flat(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row of the file as templates and verifiers read it.

        Raises:
            ValueError: if it lacks one of `columns`.
        """
        others = {ours: theirs for ours, theirs in self.columns.items() if ours != "answer"}
        return renamed(row, others) if others else row

    def __len__(self) -> int:
        """Rows in one pass."""
        return len(self.rows)

    def place(self, draw: int) -> int:
        """The row of this draw: in pass `draw // n`, place `draw % n` of that pass's permutation."""
        lap, place = divmod(draw, len(self.rows))
        return int(permutation(len(self.rows), self.seed, lap)[place]) if self.shuffle else place

    def row(self, draw: int) -> Mapping[str, Any]:
        """The row at this position."""
        return self.flat(self.rows[self.place(draw)])  # type: ignore[no-any-return]


class MixedPrompts(Prompts):
    """Several sources in one run, in fixed proportions.

    Each stretch of `sum(weights)` draws holds `weights[i]` draws of source i, so each source keeps its own order.

    Args:
        parts: The sources; each keeps its verifier and its template.
        weights: Whole numbers, one a source; by default all 1.
    """

    def __init__(self, parts: list[Prompts], weights: list[int] | None = None) -> None:
        self._parts = parts
        self.weights = weights or [1] * len(parts)
        if len(self.weights) != len(parts) or min(self.weights, default=0) < 1:
            raise ValueError(f"Expected one whole weight >= 1 for each of {len(parts)} parts, got {weights}.")
        # Spread each source evenly over the stretch: sort all places by their fraction of the source's share.
        places = [((k + 0.5) / weight, i, k) for i, weight in enumerate(self.weights) for k in range(weight)]
        self._pattern = [(i, k) for _, i, k in sorted(places)]
        self.source = " + ".join(part.source for part in parts)

    def parts(self) -> list[Prompts]:
        """All sources, also those of mixtures inside."""
        return [inner for part in self._parts for inner in part.parts()]

    def locate(self, draw: int) -> tuple[int, int]:
        """Which source this draw belongs to, and its position in that source's own order."""
        stretch, place = divmod(draw, len(self._pattern))
        part, k = self._pattern[place]
        return part, stretch * self.weights[part] + k

    def place(self, draw: int) -> int:
        """Which problem of which source."""
        part, inner = self.locate(draw)
        return self._parts[part].place(inner) * len(self._parts) + part

    def row(self, draw: int) -> Mapping[str, Any]:
        """The row at this position."""
        part, inner = self.locate(draw)
        return self._parts[part].row(inner)

    def wanted(self, draw: int) -> bool:
        """As the source says."""
        part, inner = self.locate(draw)
        return self._parts[part].wanted(inner)

    def learn(self, draw: int, outcomes: Sequence[float]) -> None:
        """Tell the source."""
        part, inner = self.locate(draw)
        self._parts[part].learn(inner, outcomes)

    def state_dict(self) -> dict[str, Any]:
        """Of all sources."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """To all sources."""
        for part, saved in zip(self._parts, state.get("parts", ()), strict=False):
            part.load_state_dict(saved)

    def prompt(self, draw: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The prompt at this position, by its source's template; its `draw` is this run's."""
        part, inner = self.locate(draw)
        return replace(self._parts[part].prompt(inner, tokenizer), draw=draw)


@functools.lru_cache(maxsize=8)
def permutation(n: int, seed: int, lap: int) -> np.ndarray:
    """The seeded order of n rows in the lap-th pass."""
    return np.random.default_rng([seed, lap]).permutation(n)


def _first_group(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return (found.group(1) or "").strip() if found else ""
