"""Files of prompts with responses, labelled or not -> rollouts -> their tokens.

A row is one of `Rollout`, with a `prompt` (the text that the model saw, or a list of chat messages), `completion` or
`response`, and where labels are asked for `score` (in [0, 1]; null is an unknown verdict) or `label` (0 or 1); or it
has several `responses`, and `labels`. `finish: length` marks a response without an end token.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from prime_lightning.prompts.rows import located_rows
from prime_lightning.prompts.template import rendered
from prime_lightning.rollout import Group, Prompt, Rollout
from prime_lightning.rollout.files import Row

Given = str | Sequence[Mapping[str, str]]
"""A prompt as a user gives it: the text that the model sees, or chat messages."""
LABELS = ("label", "labels", "score")
COLUMNS = {
    *("prompt", "completion", "response", "responses", *LABELS),
    *("iteration", "id", "draw", "source", "answer", "length", "tokens", "finish", "verdict", "reason", "sample"),
    *("process_reward", "advantage", "beta", "scale", "steps"),
}
"""What is read, and what else a run or `evaluate` writes."""


def read_rollouts(
    path: str, *, labelled: bool | None, only_known_columns: bool = False, kind: str = ""
) -> list[tuple[Row, Group]]:
    """Each row of a file or hub data set, and its rollouts; those with equal prompts have one `draw`.

    Args:
        path: A jsonl, parquet or csv file, or a hub id.
        labelled: Whether labels are read; None reads them where there are any.
        only_known_columns: Refuse other columns.
        kind: Who grades them.

    Raises:
        ValueError: for a missing, ambiguous or (if asked for) unknown column, or a row that cannot be meant.
    """
    rows = located_rows(path)
    unknown = sorted({name for _, row in rows for name in row} - COLUMNS)
    if only_known_columns and unknown:
        raise ValueError(
            f"Expected only the columns that are read in {path!r}, got also {unknown}, which may be misspelt or meant "
            "otherwise. Drop them, or ignore them with `extra_columns: true`."
        )
    draws = numbers(row.get("prompt") for _, row in rows)
    return [
        (row, [Rollout.from_row(one, where, draw=draw, kind=kind) for one in _singles(row, labelled, where)])
        for (where, row), draw in zip(rows, draws, strict=True)
    ]


def numbers(prompts: Iterable[Given | None]) -> list[int]:
    """A number for each prompt, from 0; equal ones have the same.

    Example:
        >>> numbers(["1+1=", "1+2=", "1+1="])
        [0, 1, 0]
    """
    seen: dict[str, int] = {}
    return [seen.setdefault(json.dumps(prompt, sort_keys=True, default=dict), len(seen)) for prompt in prompts]


def _singles(row: Row, labelled: bool | None, where: str) -> Iterator[Row]:
    """A row as rows of one response each, without a label that is not asked for."""
    if not row.get("prompt"):
        raise ValueError(f"Expected a prompt in {where}, got none in the columns {sorted(row)}.")
    found = [name for name in LABELS if name in row]
    if labelled and len(found) != 1:
        raise ValueError(f"Expected exactly one of {', '.join(LABELS)} in {where}, got {found or sorted(row)}.")
    about = {name: value for name, value in row.items() if labelled is not False or name not in LABELS}
    texts, labels = row.get("responses"), about.get("labels")
    if "responses" not in row and labels is None:
        yield about
        return
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"Expected a list of responses in {where}, got {texts!r:.80}.")
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(texts)):
        raise ValueError(f"Expected one label for each of {len(texts)} responses in {where}, got {labels!r:.80}.")
    for i, text in enumerate(texts):
        yield about | {"response": text} | ({} if labels is None else {"label": labels[i]})


def without_empty(rows: Sequence[tuple[Row, Group]], path: str, *, drop: bool) -> list[Rollout]:
    """The rollouts whose completions are not empty.

    Raises:
        ValueError: if there are empty ones, and they are not to be dropped; or nothing is left.
    """
    numbered = [(number, one) for number, (_, group) in enumerate(rows) for one in group]
    empty = [number for number, one in numbered if is_empty(one)]
    if empty and not drop:
        raise ValueError(
            f"Expected no empty responses in {path!r}, got {len(empty)} of {len(numbered)} (rows {empty[:5]} ..., "
            "counted from 0). Drop these rows; for training, `--data.drop_empty true` leaves them out."
        )
    if len(empty) == len(numbered):
        raise ValueError(f"Expected responses in {path!r}, got only empty ones.")
    return [one for _, one in numbered if not is_empty(one)]


def is_empty(rollout: Rollout) -> bool:
    """Whether a completion has no text."""
    return not rollout.completion.text.strip()


def grouped(rollouts: Sequence[Rollout], *, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[Group]:
    """The rollouts of each prompt, without those that are unlabelled or too long, which are counted aloud.

    Raises:
        ValueError: if nothing is left.
    """
    groups: dict[int, Group] = {}
    unknown = too_long = 0
    for one in rollouts:
        length = len(prompt_ids(one.prompt, tokenizer)) + len(response_ids(one, tokenizer))
        known, fits = one.verdict.known, length <= max_tokens
        unknown, too_long = unknown + (not known), too_long + (not fits)
        if known and fits:
            groups.setdefault(one.prompt.draw, []).append(one)
    if unknown or too_long:
        warnings.warn(
            f"Of {len(rollouts)} responses, {unknown} have no known label and {too_long} are longer than "
            f"{max_tokens} tokens with their prompt; they are left out.",
            stacklevel=2,
        )
    if not groups:
        raise ValueError(f"Expected labelled responses of at most {max_tokens} tokens, got none.")
    return list(groups.values())


def tokenized(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """The rollout of a file with the tokens of its texts."""
    return with_tokens(rollout, prompt_ids(rollout.prompt, tokenizer), response_ids(rollout, tokenizer))


def with_tokens(rollout: Rollout, prompt: Sequence[int], response: list[int]) -> Rollout:
    """A rollout of these tokens, which nobody says how they were sampled."""
    nothing: dict[str, Any] = {"logprobs": [0.0] * len(response), "versions": [0] * len(response)}
    return replace(
        rollout,
        prompt=replace(rollout.prompt, token_ids=tuple(prompt)),
        completion=replace(rollout.completion, token_ids=response, **nothing),
    )


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a prompt. A begin token is added unless the text has it already, as rendered chats do.

    Raises:
        ValueError: for chat messages, if the tokenizer has no chat template.
    """
    if not prompt.messages:
        begin = tokenizer.bos_token
        return list(
            tokenizer(prompt.text, add_special_tokens=not (begin and prompt.text.startswith(begin)))["input_ids"]
        )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"Expected a tokenizer with a chat template for prompts that are messages, got {tokenizer.name_or_path!r} "
            "without one. Give the prompts as text (for `processbench`: `--chat false`)."
        )
    text = rendered([dict(message) for message in prompt.messages], tokenizer)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def response_ids(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a completion, with the end token if the model ended it."""
    ids = list(tokenizer(rollout.completion.text, add_special_tokens=False)["input_ids"])
    return ids if rollout.completion.truncated else [*ids, int(tokenizer.eos_token_id)]
