"""Prompts of a data set that is read while training goes on, not before: files or a hub id in streaming mode.

A run's order asks for rows by their number, also for some that it has asked for before. Rows are read in order, the
last ones are kept, and the reader's state is noted now and then, so that any row is found again from the note before
it. The notes are a part of the loader's checkpoint: a resumed run goes on with the very next row and reads none twice.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from prime_lightning.prompts.dataset import DatasetPrompts, permutation
from prime_lightning.prompts.rows import stream_rows
from prime_lightning.prompts.template import CODE_USER, MATHS_USER, Template
from prime_lightning.rollout import Prompt

NOTE_EVERY = 256  # rows
NOTES = 64


class Stream:
    """An endless stream of rows, by number: the data set again and again, in its own order.

    Args:
        rows: A `datasets.IterableDataset`.
        keep: Rows that are remembered, the last ones that were read.

    Raises:
        ValueError: if there is no row.
    """

    def __init__(self, rows: Any, keep: int) -> None:
        self.rows, self.length, self._lock = rows, 0, threading.Lock()
        self._kept: deque[Mapping[str, Any]] = deque(maxlen=keep)
        self._start = rows.state_dict()
        self._notes: deque[tuple[int, dict[str, Any]]] = deque(maxlen=NOTES)
        self._open(0, self._start)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        with self._lock:  # sampling ahead and a look at the engine may ask at once
            first, note = self._next - len(self._kept), self._note(index)
            if index < first or note[0] > self._next:
                self._open(*note)
            while self._next <= index:
                self._read()
            return self._kept[index - self._next]

    def _open(self, index: int, state: dict[str, Any]) -> None:
        """Go on with this row, by the state of the reader in front of it."""
        self._next = index
        self._kept.clear()
        self.rows.load_state_dict(state)
        self._reader: Iterator[Mapping[str, Any]] = iter(self.rows)

    def _note(self, index: int) -> tuple[int, dict[str, Any]]:
        """The last note in front of a row; the start of its pass where that is nearer."""
        before = [note for note in self._notes if note[0] <= index]
        lap = self.length * (index // self.length) if self.length else 0
        return max([*before, (lap, self._start)], key=lambda note: note[0])

    def _read(self) -> None:
        if self._next % NOTE_EVERY == 0 and all(self._next > index for index, _ in self._notes):
            self._notes.append((self._next, self.rows.state_dict()))
        row = next(self._reader, None)
        if row is None:
            self._again()
            row = next(self._reader)
        self._kept.append(row)
        self._next += 1

    def _again(self) -> None:
        """Begin the next pass."""
        if self._next == 0:
            raise ValueError("Expected at least one row in the stream, got none.")
        self.length = self.length or self._next
        self.rows.load_state_dict(self._start)
        self._reader = iter(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The notes, and the length once it is known; plain values."""
        return {"notes": [list(note) for note in self._notes], "length": self.length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up notes of the same data set."""
        self._notes = deque(((index, note) for index, note in state.get("notes", ())), maxlen=NOTES)
        self.length = state.get("length", 0)
        self._open(0, self._start)
        if self._notes:
            self._open(*self._notes[-1])


class StreamedPrompts(DatasetPrompts):
    """The rows of a file or of a hub data set that is too large to be fetched before training starts.

    As `DatasetPrompts`, with three differences. Nothing looks through all rows first: a row without an answer is an
    error when it is come to, or is passed over. Rows are shuffled inside blocks of `block` rows, each in a seeded order
    of its own. Numbers have the digits that 64 bits hold; write longer references as text.

    Args:
        path: A jsonl, parquet or csv file (`.gz` too), a list of such files or URLs, or a hub id.
        kind: As there; so are `template`, `split`, `name`, `revision`, `columns`, `answer_pattern` and `source`.
        template: How a row becomes text.
        split: Split of a hub data set.
        name: Configuration of a hub data set.
        revision: Commit of a hub data set; pin it, or a resumed run may go on in other rows.
        columns: What these rows call otherwise: our name, and theirs or a path.
        answer_pattern: What the answer is in what its column says.
        source: Name for counts per source.
        block: Rows that are shuffled together, and kept in memory; 1 keeps the order.
        seed: Of the shuffling.
        drop_unanswered: Pass over rows that have no answer, instead of an error.

    Raises:
        ValueError: if the data set is missing or empty, or its first row gives no prompt.
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
        block: int = 1000,
        seed: int = 0,
        drop_unanswered: bool = False,
    ) -> None:
        if block < 1:
            raise ValueError(f"Expected `block` of at least 1 row, got {block}.")
        self.kind, self.block, self.seed, self.drop = kind, block, seed, drop_unanswered
        self.columns, self.answer_pattern = columns or {}, answer_pattern
        self.source = source or (path if isinstance(path, str) else path[0]).rsplit("/", 1)[-1].split(".")[0]
        rows = stream_rows(path, split=split, name=name, revision=revision)
        self.stream = Stream(rows, keep=2 * block)
        self.template = template or Template(user=CODE_USER if kind == "code" else MATHS_USER)
        self.template.messages(self.flat(self.stream[0]), self.hidden())

    def index(self, draw: int) -> int:
        """The row of the endless stream: in block `draw // block`, place `draw % block` of that block's permutation."""
        block, place = divmod(draw, self.block)
        return block * self.block + int(permutation(self.block, self.seed, block)[place])

    def place(self, draw: int) -> int:
        """The row of the data set, as far as its length is known by now."""
        index = self.index(draw)
        return index % self.stream.length if self.stream.length else index

    def row(self, draw: int) -> Mapping[str, Any]:
        """The row at this position."""
        return self.flat(self.stream[self.index(draw)])

    def wanted(self, draw: int) -> bool:
        """Whether the row has an answer, where those without are left out."""
        row = self.row(draw)
        reason = "" if self.kind_of(row) == "code" else self._unread(row) or (not self.answer_of(row) and "no answer")
        if reason and not self.drop:
            raise ValueError(
                f"Expected an answer in `{self.answer}`, got none in row {self.place(draw)} of {self.source!r}: "
                f"{reason}. Set `columns` or `answer_pattern`, or `drop_unanswered: true`, which passes over them."
            )
        return not reason

    def references(self) -> Iterator[Prompt]:
        """None: they are not known before training."""
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        """Where the reader is."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self.stream.load_state_dict(state.get("stream", {}))

    def __bool__(self) -> bool:
        """There are rows, and nobody knows how many."""
        return True
