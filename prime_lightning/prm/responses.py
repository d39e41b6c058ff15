"""Files of prompts with responses, labelled or not -> `Response`s -> the tensors of a `Batch`.

A row has a `prompt` (the text that the model saw, or a list of chat messages), one response (`response`, or
`completion` as a run's `rollouts.jsonl` has it) or several (`responses`), and where labels are asked for `label`
(0 or 1), `labels`, or `score` (in [0, 1]; null is an unknown verdict). `finish: length` marks a response without an
end token.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from prime_lightning.models.batch import Batch, pad
from prime_lightning.prompts.rows import load_rows
from prime_lightning.prompts.template import rendered

Prompt = str | Sequence[Mapping[str, str]]
"""The text that the model sees, or chat messages."""

RESPONSES = ("response", "completion", "responses")
LABELS = ("label", "labels", "score")
LOGGED = (
    *("iteration", "draw", "source", "answer", "tokens", "finish", "verdict"),
    *("process_reward", "advantage", "beta", "scale", "steps"),
)
"""Further columns of a run's `rollouts.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response to a prompt."""

    row: int
    """Number of its row in the file, from 0."""
    prompt: Prompt
    text: str
    label: float | None = None
    """Outcome in [0, 1]; None where it is unknown."""
    finished: bool = True
    """Whether the model ended it; otherwise it was cut off, and no end token belongs to it."""

    @property
    def group(self) -> Hashable:
        """Equal for responses to one prompt."""
        return self.prompt if isinstance(self.prompt, str) else tuple(str(sorted(m.items())) for m in self.prompt)


def read_responses(
    path: str, *, labelled: bool, only_known_columns: bool = False, split: str = "train"
) -> tuple[list[Response], list[dict[str, Any]]]:
    """The responses of a file or hub data set, in order, and its rows.

    Raises:
        ValueError: for a missing, ambiguous or (if asked for) unknown column, or a row that cannot be meant.
    """
    table = load_rows(path, split=split, name=None, revision=None)
    columns = table.column_names
    if "prompt" not in columns:
        raise ValueError(f"Expected the column `prompt` in {path!r}, got {sorted(columns)}.")
    response = _one_of(RESPONSES, columns, path)
    label = _one_of(LABELS, columns, path) if labelled else None
    unknown = sorted(set(columns) - {"prompt", "id", response, label, *LOGGED})
    if only_known_columns and unknown:
        raise ValueError(
            f"Expected only the columns that are read in {path!r}, got also {unknown}, which may be misspelt or meant "
            "otherwise. Drop them, or ignore them with `extra_columns: true`."
        )
    rows = [dict(row) for row in table]
    return [one for i, row in enumerate(rows) for one in _responses(i, row, response, label, path)], rows


def _one_of(names: Sequence[str], columns: Sequence[str], path: str) -> str:
    found = [name for name in names if name in columns]
    if len(found) != 1:
        raise ValueError(
            f"Expected exactly one of the columns {', '.join(names)} in {path!r}, got {found or sorted(columns)}."
        )
    return found[0]


def _responses(i: int, row: Mapping[str, Any], response: str, label: str | None, path: str) -> Iterator[Response]:
    where = f"row {i} of {path!r}, counted from 0"
    if not row["prompt"]:
        raise ValueError(f"Expected a prompt in {where}, got none.")
    texts = row[response] if response == "responses" else [row[response]]
    labels = None if label is None else row[label] if label == "labels" else [row[label]] * len(texts or ())
    if not texts:
        raise ValueError(f"Expected responses in {where}, got none.")
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(texts)):
        raise ValueError(f"Expected one label for each of {len(texts)} responses in {where}, got {labels!r}.")
    for k, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"Expected text in `{response}` of {where}, got {text!r}.")
        value = None if labels is None else _label(labels[k], str(label), where)
        finished = row.get("finish") != "length"
        yield Response(row=i, prompt=row["prompt"], text=text, label=value, finished=finished)


def _label(value: Any, column: str, where: str) -> float | None:
    """A label as a number; a `score` may be a fraction, or null for an unknown verdict."""
    if column == "score" and (value is None or (isinstance(value, float | int) and 0 <= value <= 1)):
        return None if value is None else float(value)
    if value in (0, 1):  # True and False, too
        return float(value)
    expected = "a number in [0, 1], or null," if column == "score" else "0 or 1"
    raise ValueError(f"Expected {expected} in `{column}` of {where}, got {value!r}.")


def without_empty(responses: Sequence[Response], path: str, *, drop: bool) -> list[Response]:
    """The responses that are not empty.

    Raises:
        ValueError: if there are empty ones, and they are not to be dropped; or nothing is left.
    """
    empty = [one.row for one in responses if not one.text.strip()]
    if empty and not drop:
        raise ValueError(
            f"Expected no empty responses in {path!r}, got {len(empty)} of {len(responses)} (rows {empty[:5]} ..., "
            "counted from 0). Drop these rows; for training, `--data.drop_empty true` leaves them out."
        )
    if len(empty) == len(responses):
        raise ValueError(f"Expected responses in {path!r}, got only empty ones.")
    return [one for one in responses if one.text.strip()]


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a prompt. A begin token is added unless the text has it already, as rendered chats do.

    Raises:
        ValueError: for chat messages, if the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        begin = tokenizer.bos_token
        return list(tokenizer(prompt, add_special_tokens=not (begin and prompt.startswith(begin)))["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError(
            f"Expected a tokenizer with a chat template for prompts that are messages, got {tokenizer.name_or_path!r} "
            "without one. Give the prompts as text (for `processbench`: `--chat false`)."
        )
    text = rendered([dict(message) for message in prompt], tokenizer)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batch_of(
    responses: Sequence[Response], prompts: Sequence[Sequence[int]], encoded: Sequence[Sequence[int]]
) -> Batch:
    """The tensors of responses whose tokens are given; responses to the same prompt are one group."""
    number: dict[Hashable, int] = {}
    response_length_B = torch.tensor([len(tokens) for tokens in encoded])
    valid_B = torch.tensor([one.label is not None for one in responses])
    inside_BT = torch.arange(int(response_length_B.max()))[None] < response_length_B[:, None]
    return Batch(
        tokens_BL=pad([[*p, *r] for p, r in zip(prompts, encoded, strict=True)], torch.long),
        prompt_length_B=torch.tensor([len(tokens) for tokens in prompts]),
        response_length_B=response_length_B,
        mask_BT=inside_BT,
        outcome_B=torch.tensor([one.label or 0.0 for one in responses]),
        valid_B=valid_B,
        group_B=torch.tensor([number.setdefault(one.group, len(number)) for one in responses]),
        behaviour_logprobs_BT=torch.zeros(inside_BT.shape),
        version_BT=torch.zeros(inside_BT.shape, dtype=torch.long),
    )


def grouped(responses: Sequence[Response], *, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Rows of the responses to each prompt, without those that are unlabelled or too long, which are counted aloud.

    Raises:
        ValueError: if nothing is left.
    """
    groups: dict[Hashable, list[int]] = {}
    unknown = too_long = 0
    for i, one in enumerate(responses):
        length = len(prompt_ids(one.prompt, tokenizer)) + len(response_ids(one, tokenizer))
        unknown, too_long = unknown + (one.label is None), too_long + (length > max_tokens)
        if one.label is not None and length <= max_tokens:
            groups.setdefault(one.group, []).append(i)
    if unknown or too_long:
        warnings.warn(
            f"Of {len(responses)} responses, {unknown} have no known label and {too_long} are longer than "
            f"{max_tokens} tokens with their prompt; they are left out.",
            stacklevel=2,
        )
    if not groups:
        raise ValueError(f"Expected labelled responses of at most {max_tokens} tokens, got none.")
    return list(groups.values())


def response_ids(response: Response, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a response, with the end token if the model ended it."""
    ids = list(tokenizer(response.text, add_special_tokens=False)["input_ids"])
    return [*ids, int(tokenizer.eos_token_id)] if response.finished else ids
