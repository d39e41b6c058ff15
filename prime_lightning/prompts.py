"""Rows of a data set -> `Prompt`s, in an endless seeded order in which a position is one integer.

`prompts.prompt(draw, tokenizer)` is the draw-th prompt of the run. Nothing else has to be saved to resume, and nothing
depends on how fast rows are consumed. Data sets are read by Hugging Face `datasets`: jsonl, parquet or csv files (gzip
too) or a hub id.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prime_lightning.rollout import Prompt

if TYPE_CHECKING:
    import datasets

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
MATHS_USER = "{problem}\n\nPresent the answer in LaTex format: \\boxed{{Your answer}}"
CODE_USER = (
    "{prompt}\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
)


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a row becomes the text that the model sees.

    Example:
        >>> Template(user="{problem} =", chat=False).messages({"problem": "1+1"})
        [{'role': 'user', 'content': '1+1 ='}]
    """

    user: str = MATHS_USER
    """Format string over the row's fields. The default is the one of PRIME's authors for mathematics."""
    system: str | None = None
    """System message; None leaves it out."""
    chat: bool = True
    """Use the tokenizer's chat template; False gives the user text as it is."""

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The row as chat messages."""
        try:
            user = self.user.format_map(row)
        except KeyError as error:
            raise ValueError(
                f"Expected the row to have the field {error} that the template {self.user!r} names, "
                f"got the fields {sorted(row)}. Change `template.user` or the data."
            ) from None
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": user}]

    def encode(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[int, ...]]:
        """The text that the model sees, and its tokens."""
        messages = self.messages(row)
        if not self.chat:
            text = "".join(message["content"] for message in messages)
            return text, tuple(tokenizer(text)["input_ids"])
        if tokenizer.chat_template is None:
            raise ValueError(
                f"Expected a tokenizer with a chat template, got {tokenizer.name_or_path!r} without one. "
                "Set `template.chat: false` (`--chat false` of `evaluate`), or take an instruct model's tokenizer."
            )
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


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
        return str(row.get("answer") or "")

    def kind_of(self, row: Mapping[str, Any]) -> str:
        """Which verifier grades this row."""
        return self.kind

    def prompt(self, draw: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The prompt at this position, tokenized."""
        row = self.row(draw)
        text, token_ids = self.template.encode(row, tokenizer)
        return Prompt(
            draw=draw,
            token_ids=token_ids,
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
        answer_field: Field with the reference answer. Every row needs it, but for `code`.
        answer_pattern: Regular expression whose first group is the answer inside that field; None takes all of it.
        source: Name for counts per source; by default the file's or data set's name.
        shuffle: Permute each pass; False keeps the file's order.
        seed: Of the permutation.
        limit: Only the first rows; None takes all.

    Raises:
        ValueError: if the data set is missing, empty, or has a row without an answer.
    """

    def __init__(
        self,
        path: str | list[str],
        kind: str = "math",
        template: Template | None = None,
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        answer_field: str = "answer",
        answer_pattern: str | None = None,
        source: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.kind, self.shuffle, self.seed = kind, shuffle, seed
        self.answer_field, self.answer_pattern = answer_field, answer_pattern
        self.template = template or Template(user=CODE_USER if kind == "code" else MATHS_USER)
        first = path if isinstance(path, str) else path[0]
        self.source = source or Path(first.removesuffix(".gz")).stem
        self.rows = load_rows(path, split=split, name=name, revision=revision)
        if limit is not None:
            self.rows = self.rows.select(range(min(limit, len(self.rows))))
        self._check(first)

    def _check(self, path: str) -> None:
        if len(self.rows) == 0:
            raise ValueError(f"Expected at least one row in {path!r}, got an empty data set.")
        if self.kind != "code":
            check_filled(self.rows, self.answer_field, path, option="answer_field")
        if self.answer_pattern is not None:
            for answer in self.rows[self.answer_field]:
                self.answer_of({self.answer_field: answer})

    def answer_of(self, row: Mapping[str, Any]) -> str:
        """The answer's field, or what the pattern finds in it."""
        answer = row.get(self.answer_field)
        text = "" if answer is None else str(answer)
        if self.answer_pattern is None:
            return text
        found = re.search(self.answer_pattern, text)
        if found is None:
            raise ValueError(f"Expected an answer that matches `answer_pattern` {self.answer_pattern!r}, got {text!r}.")
        return found.group(1)

    def references(self) -> Iterator[Prompt]:
        """All rows in the order of the file."""
        for i in range(len(self.rows)):
            row = self.flat(self.rows[i])
            yield Prompt(
                draw=i,
                token_ids=(),
                text="",
                kind=self.kind_of(row),
                answer=self.answer_of(row),
                source=self.source,
                row=row,
            )

    def keep(self, rows: Sequence[int]) -> None:
        """Leave all other rows out."""
        self.rows = self.rows.select(rows)

    def flat(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row of the file as templates and verifiers read it."""
        return row

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

    def parts(self) -> list[Prompts]:
        """All sources, also those of mixtures inside."""
        return [inner for part in self._parts for inner in part.parts()]

    def locate(self, draw: int) -> tuple[int, int]:
        """Which source this draw belongs to, and its position in that source's own order."""
        stretch, place = divmod(draw, len(self._pattern))
        part, k = self._pattern[place]
        return part, stretch * self.weights[part] + k

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
        prompt = self._parts[part].prompt(inner, tokenizer)
        return Prompt(
            draw=draw,
            token_ids=prompt.token_ids,
            text=prompt.text,
            kind=prompt.kind,
            answer=prompt.answer,
            source=prompt.source,
            row=prompt.row,
        )


@functools.lru_cache(maxsize=8)
def permutation(n: int, seed: int, lap: int) -> np.ndarray:
    """The seeded order of n rows in the lap-th pass."""
    return np.random.default_rng([seed, lap]).permutation(n)


def check_filled(rows: datasets.Dataset, field: str, path: str, *, option: str) -> None:
    """Refuse rows that lack a field.

    Raises:
        ValueError: if no row has it, or it is empty in some.
    """
    if field not in rows.column_names:
        raise ValueError(f"Expected the field {field!r} in {path!r}, got {sorted(rows.column_names)}. Set `{option}`.")
    missing = [i for i, value in enumerate(rows[field]) if value is None or not str(value).strip()]
    if missing:
        raise ValueError(
            f"Expected `{field}` in every row of {path!r}, got none in {len(missing)} of {len(rows)} "
            f"(rows {missing[:5]} ..., counted from 0). Drop or fill these rows."
        )


def load_rows(path: str | Sequence[str], *, split: str, name: str | None, revision: str | None) -> datasets.Dataset:
    """Read files (by their ending) or a hub data set.

    Raises:
        ValueError: if a file is missing, or neither a file nor a data set that can be loaded.
    """
    import datasets  # here, because it brings pandas, which takes longer than all that `plan` computes

    files = [path] if isinstance(path, str) else list(path)
    loader = LOADERS.get(Path(files[0].removesuffix(".gz")).suffix)
    if loader is not None:
        missing = [file for file in files if "://" not in file and not Path(file).is_file()]
        if missing:
            raise ValueError(f"Expected a data file, got {missing[0]!r}, which does not exist.")
        try:
            return datasets.load_dataset(loader, data_files=files, split="train")
        except (StopIteration, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(
                f"Expected rows in {files}, got a file that is empty or cannot be read: {error.__cause__ or 'no rows'}."
            ) from error
    try:
        return datasets.load_dataset(files[0], name, split=split, revision=revision)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"Expected a {'/'.join(LOADERS)} file or a data set of the hub, got {files[0]!r}: {error}. Where "
            "the hub cannot be reached, give a file."
        ) from error
