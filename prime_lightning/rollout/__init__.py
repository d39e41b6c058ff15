"""The nouns that travel through the package: prompts, sampling numbers, completions, verdicts, rollouts.

The one mask convention of the package: `mask` is bool; True marks a token that the policy sampled and that is
trained on. Prompt tokens, padding and responses without a verdict are False.

Plain data only: nothing here samples, grades or computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, as the engine sees it and as the verifier needs it.

    Example:
        >>> prompt = Prompt(draw=7, token_ids=(5, 6), text="1+1=", kind="exact", answer="2", source="sums")
        >>> prompt.answer
        '2'
    """

    draw: int
    """Position in the run's endless prompt order; unique in a run, it seeds the sampling of this prompt."""
    token_ids: tuple[int, ...]
    """Tokens given to the model, chat template applied."""
    text: str
    """The same as text, for logs and pages."""
    kind: str
    """Who grades it: `exact`, `math`, `code`, or the import path of a function `(prompt, completion) -> float`."""
    answer: str = ""
    """Reference answer; for `code` it is empty and the tests stand in `row`."""
    source: str = ""
    """Name of the data set, for counts per source."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The data row it came from; verifiers read what they need (tests, entry point, ...)."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Chat messages, of a prompt from a file that no chat template has rendered yet; then there is no `text`."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn.

    Example:
        >>> Sampling(samples=4, temperature=0.7).samples
        4
    """

    samples: int = 4
    """Completions of one prompt, `K` in the paper."""
    max_tokens: int = 3072
    """Longest completion in tokens, the stop token included."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this; 1 is off."""
    top_k: int = 0
    """Only this many most likely tokens; 0 is off."""
    mask_padding: bool = False
    """Never draw an id without a token, of which a padded embedding has some; what is left is made to sum to 1. The
    trainer's policy does the same."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, besides the tokenizer's end token. They stay in the completion."""
    seed: int = 0
    """With a prompt's `draw` and a sample's number it fixes that sample, whatever else is in the batch."""

    @property
    def truncation(self) -> float:
        """Most nats by which top-p and top-k raise a token's log-prob: `-log top_p`, and no limit with top-k."""
        return math.inf if self.top_k else -math.log(self.top_p)

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("samples", self.samples >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "0 (greedy) or positive"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
        ):
            if not ok:
                raise ValueError(f"Expected sampling `{name}` {expected}, got {getattr(self, name)}.")


class Finish(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The end token or a stop string was sampled."""
    LENGTH = "length"
    """`max_tokens` was reached: the completion is truncated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer. The three lists have one entry per sampled token.

    Example:
        >>> done = Completion(text="2", token_ids=[7, 1], logprobs=[-0.1, -0.2], finish=Finish.STOP, versions=[3, 3])
        >>> done.truncated
        False
    """

    text: str
    """Decoded tokens, special tokens left out."""
    token_ids: list[int]
    """`[T]` sampled tokens, the end token included."""
    logprobs: list[float]
    """`[T]` nats under the distribution that was sampled from (temperature, top-p and top-k applied)."""
    finish: Finish | None
    """None where a file does not say."""
    versions: list[int]
    """`[T]` version of the weights that sampled each token; version n is the policy after n iterations."""
    counted: int | None = None
    """Number of tokens, of a completion from a file, whose ids are not known."""

    @property
    def length(self) -> int | None:
        """Number of tokens; None where a file does not say."""
        return len(self.token_ids) or self.counted

    @property
    def truncated(self) -> bool:
        """Whether the token limit ended it."""
        return self.finish is Finish.LENGTH


class Label(StrEnum):
    """What a verifier says of a completion."""

    CORRECT = "correct"
    WRONG = "wrong"
    PARTIAL = "partial"
    """Code that passes some of its tests; the score is their share."""
    UNKNOWN = "unknown"
    """The verifier failed, never the completion. It is not a label: such a response is masked out everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A verifier's word on one completion.

    Example:
        >>> Verdict.of_score(0.25, reason="1 of 4 tests passed").label.value
        'partial'
        >>> Verdict.unknown("worker died").known
        False
    """

    label: Label
    score: float
    """Outcome reward in [0, 1]; NaN where unknown."""
    reason: str = ""
    seconds: float = 0.0

    @property
    def known(self) -> bool:
        """Whether there is a label to learn from."""
        return self.label is not Label.UNKNOWN

    @property
    def known_score(self) -> float | None:
        """The score; None where it is unknown."""
        return self.score if self.known else None

    def to_row(self) -> dict[str, Any]:
        """`verdict`, `score` (None where unknown) and `reason`."""
        return {"verdict": str(self.label), "score": self.known_score, "reason": self.reason}

    @classmethod
    def of_score(cls, score: float, *, reason: str = "", seconds: float = 0.0) -> Verdict:
        """The verdict of a score in [0, 1]; anything else, NaN too, is the verifier's failure and so unknown."""
        if not 0.0 <= score <= 1.0:
            return cls.unknown(f"the verifier returned {score}, not a number in [0, 1]", seconds=seconds)
        label = Label.CORRECT if score == 1.0 else Label.WRONG if score == 0.0 else Label.PARTIAL
        return cls(label=label, score=float(score), reason=reason, seconds=seconds)

    @classmethod
    def unknown(cls, reason: str, *, seconds: float = 0.0) -> Verdict:
        """No verdict, because of a failure of ours."""
        return cls(label=Label.UNKNOWN, score=math.nan, reason=reason, seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A prompt, one completion and its verdict. As a row it is the line of every jsonl file that has answers.

    docs/files.md lists the keys of a row, and those that other tools write.

    Example:
        >>> found = Rollout.from_row({"prompt": "1+1=", "response": "2", "label": 1}, "line 1")
        >>> row = found.to_row()
        >>> row["completion"], row["verdict"], row["score"]
        ('2', 'correct', 1.0)
    """

    prompt: Prompt
    completion: Completion
    verdict: Verdict

    def to_row(self) -> dict[str, Any]:
        """The texts, what is known of their tokens, and the verdict; not the tokens themselves."""
        prompt, completion = self.prompt, self.completion
        return {
            "id": str(prompt.row.get("id", prompt.draw)),
            "draw": prompt.draw,
            "source": prompt.source,
            "prompt": [dict(message) for message in prompt.messages] or prompt.text,
            "answer": prompt.answer,
            "completion": completion.text,
            "length": completion.length,
            "finish": None if completion.finish is None else str(completion.finish),
            **self.verdict.to_row(),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str, *, draw: int | None = None, kind: str = "") -> Rollout:
        """A row of `to_row`, or of another tool; its tokens are not known.

        Args:
            row: With `completion` or `response`; all other keys may be missing.
            where: File and line, for messages.
            draw: Of the prompt, whatever the row says.
            kind: Who grades it.

        Raises:
            ValueError: if a key that is read has a value that cannot be meant, or there is no completion, or two.
        """
        prompt = _checked(row, "prompt", _PROMPT, where)
        if draw is None:
            draw = _checked(row, "draw", _COUNT, where)
        if draw is None:
            draw = row["problem"] if type(row.get("problem")) is int else 0
        answer, finish = row.get("answer"), _checked(row, "finish", _FINISH, where)
        tokens = _checked(row, "tokens", _TOKENS, where)
        length = len(tokens) if isinstance(tokens, list) else tokens
        return cls(
            prompt=Prompt(
                draw=draw,
                token_ids=(),
                text=prompt if isinstance(prompt, str) else "",
                kind=kind,
                answer="" if answer is None else str(answer),
                source=str(row.get("source") or ""),
                row=row,
                messages=() if prompt is None or isinstance(prompt, str) else tuple(prompt),
            ),
            completion=Completion(
                text=_checked(row, _one_of(row, TEXTS, where), _TEXT, where),
                token_ids=[],
                logprobs=[],
                finish=None if finish is None else Finish(finish),
                versions=[],
                counted=_checked(row, "length", _COUNT, where) or length,
            ),
            verdict=_verdict(row, where),
        )


Group = list[Rollout]
"""The rollouts of one prompt. A group is never split between batches, ranks or minibatches."""


# ---- rows ------------------------------------------------------------------------------------------------------------

TEXTS = ("completion", "response")
SCORES = ("score", "label")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, Mapping) for part in value)


def _count(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


Check = tuple[str, Callable[[Any], bool]]
_PROMPT: Check = ("text or a list of chat messages", lambda v: v is None or isinstance(v, str) or _are_messages(v))
_TEXT: Check = ("text", lambda v: isinstance(v, str))
_COUNT: Check = ("a number of 0 or more, or null,", _count)
_TOKENS: Check = ("a number of tokens, a list of them, or null,", lambda v: isinstance(v, list) or _count(v))
_FINISH: Check = ("stop, length or null", lambda v: v in (None, *Finish))
_SCORE: Check = (
    "a number in [0, 1], or null,",
    lambda v: v is None or (isinstance(v, int | float) and 0 <= v <= 1),
)
_LABEL: Check = ("0 or 1", lambda v: v in (0, 1))


def _checked(row: Mapping[str, Any], key: str, check: Check, where: str) -> Any:
    value, (expected, is_meant) = row.get(key), check
    if not is_meant(value):
        raise ValueError(f"Expected {expected} in `{key}` of {where}, got {value!r:.80}.")
    return value


def _one_of(row: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    found = [key for key in keys if key in row]
    if len(found) != 1:
        raise ValueError(f"Expected exactly one of {', '.join(keys)} in {where}, got {found or sorted(row)}.")
    return found[0]


def _verdict(row: Mapping[str, Any], where: str) -> Verdict:
    """What a row's `score` or `label` says; unknown where it has neither."""
    reason = str(row.get("reason") or "")
    key = _one_of(row, SCORES, where) if any(key in row for key in SCORES) else "score"
    score = _checked(row, key, _LABEL if key == "label" else _SCORE, where)
    return Verdict.unknown(reason) if score is None else Verdict.of_score(float(score), reason=reason)
