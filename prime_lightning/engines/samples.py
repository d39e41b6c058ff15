"""What every engine derives from a prompt and sampling numbers in the same way, and streams that are drawn elsewhere.

The key of each sample, the tokens that end one, whether prompts fit the context, the finished `Completion`; which
samples of a stream wait, which are being computed elsewhere, which groups are whole; and the one loop that draws them
through a `Channel`: a pipe to a process (`vllm/process.py`), another rank that owns one (`vllm/remote.py`), or HTTP to
servers (`server/fleet.py`).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from prime_lightning.engines import FinishedSamples
from prime_lightning.models.pretrained import ids_with_token, load_tokenizer
from prime_lightning.rollout import Completion, Finish, Prompt, Sampling


def sample_keys(seed: int, draws: Sequence[int], samples: int) -> np.ndarray:
    """One 64-bit key a sample, `[len(draws) * samples]`, from seed, draw and the sample's number.

    Example:
        >>> both, second = sample_keys(0, [3, 5], 2), sample_keys(0, [5], 2)
        >>> bool((both[2:] == second).all()), len(set(both.tolist()))
        (True, 4)
    """
    keys = mix(np.asarray(draws, dtype=np.uint64) + mix(np.array([seed], dtype=np.uint64)))
    return mix(keys[:, None] + np.arange(samples, dtype=np.uint64)).reshape(-1)


def sample_seeds(seed: int, draw: int, samples: int) -> list[int]:
    """The keys of one prompt's samples as non-negative 63-bit integers, the range that engines take as a seed."""
    return [int(key >> np.uint64(1)) for key in sample_keys(seed, [draw], samples)]


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that scatters them."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation: int | list[int] | None) -> list[int]:
    """All tokens that end a completion: the tokenizer's and those of the model's generation config.

    Raises:
        ValueError: if there is none, since no completion would ever end.
    """
    listed = generation if isinstance(generation, list) else [generation]
    ids = sorted({i for i in (tokenizer.eos_token_id, *listed) if i is not None})
    if not ids:
        raise ValueError(f"Expected a tokenizer with an end token, got {tokenizer.name_or_path!r} without one.")
    return ids


def generation_end(model: str) -> int | list[int] | None:
    """End tokens of a model's generation config, or of its config where it has none."""
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id  # type: ignore[no-any-return]
    except OSError:
        return getattr(AutoConfig.from_pretrained(model), "eos_token_id", None)


def check_fits(prompts: Sequence[Prompt], sampling: Sampling, limit: int | None) -> None:
    """Refuse prompts that leave no room for `max_tokens` in a context of `limit` tokens (None: no limit).

    Raises:
        ValueError: for the first prompt that is too long.
    """
    for prompt in prompts:
        if limit is not None and len(prompt.token_ids) + sampling.max_tokens > limit:
            raise ValueError(
                f"Expected prompt and completion to fit the model's {limit} positions, got {len(prompt.token_ids)} "
                f"prompt tokens and max_tokens {sampling.max_tokens}. Lower `max_tokens` or drop long prompts."
            )


def completion_of(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], logprobs: list[float], finish: str, versions: list[int]
) -> Completion:
    """A finished sample as a `Completion`, from an engine's reason `stop` or `length`.

    Raises:
        RuntimeError: for any other reason, which no sample that counts may have.
    """
    if finish not in ("stop", "length"):
        raise RuntimeError(f"Expected an engine to finish a sample by `stop` or `length`, got {finish!r}.")
    assert len(token_ids) == len(logprobs) == len(versions)
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return Completion(
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        finish=Finish(finish),
        versions=versions,
    )


class Groups:
    """Finished samples of the prompts of one stream; a whole group leaves it.

    Args:
        prompts: Of the stream; `grow` takes those in that were added.
        samples: Of each prompt.
        finished: Where finished samples of groups that are not whole come from and stay; see `Engine.stream`.

    Example:
        >>> prompt = Prompt(draw=7, token_ids=(5, 6), text="1+1=", kind="exact")
        >>> done = Completion(text="2", token_ids=[4], logprobs=[-1.0], finish=Finish.STOP, versions=[0])
        >>> groups = Groups([prompt], 2, finished={7: {1: done}})
        >>> groups.missing()
        [(0, 0)]
        >>> [(p.draw, len(group)) for p, group in groups.add(0, 0, done)], len(groups)
        ([(7, 2)], 0)
    """

    def __init__(self, prompts: Sequence[Prompt], samples: int, finished: FinishedSamples | None = None) -> None:
        self.prompts, self.samples, self._finished = prompts, samples, finished
        self._open: dict[int, dict[int, Completion]] = {}
        self.known = 0
        self.grow()

    def __len__(self) -> int:
        """Groups that are not whole."""
        return len(self._open)

    def grow(self) -> list[int]:
        """Take in prompts that were added to the list; returns their places."""
        added = list(range(self.known, len(self.prompts)))
        for i in added:
            self._open[i] = {} if self._finished is None else self._finished.setdefault(self.prompts[i].draw, {})
        self.known = len(self.prompts)
        return added

    def missing(self) -> list[tuple[int, int]]:
        """Samples to draw: index of the prompt and number of the sample."""
        return self.missing_of(self._open)

    def missing_of(self, places: Iterable[int]) -> list[tuple[int, int]]:
        """Those of some prompts."""
        return [(i, k) for i in places for k in range(self.samples) if k not in self._open[i]]

    def add(self, i: int, k: int, completion: Completion) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Take a finished sample; yield the group that it completes."""
        group, prompt = self._open[i], self.prompts[i]
        group[k] = completion
        if len(group) == self.samples:
            del self._open[i]
            if self._finished is not None:
                del self._finished[prompt.draw]
            yield prompt, [group[number] for number in range(self.samples)]


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to draw."""

    name: str
    """`stream.prompt.sample`, unique in an engine."""
    prompt: int
    """Index of the prompt in the stream."""
    sample: int
    seed: int | None
    """None for greedy samples, and where samples need not repeat."""


@dataclass
class Work:
    """The samples of one stream.

    Example:
        >>> prompt = Prompt(draw=7, token_ids=(5, 6), text="1+1=", kind="exact")
        >>> work = Work("s0", [prompt], Sampling(samples=2))
        >>> [request.name for request in work.take(window=8)], work.unfinished
        (['s0.0.0', 's0.0.1'], True)
    """

    name: str
    prompts: Sequence[Prompt]
    sampling: Sampling
    seeded: bool = True
    flying: dict[str, Request] = field(default_factory=dict)
    """Requests that an engine has taken and not finished."""
    finished: FinishedSamples | None = None
    """See `Engine.stream`."""

    def __post_init__(self) -> None:
        repeats = self.seeded or self.sampling.temperature == 0
        self.groups = Groups(self.prompts, self.sampling.samples, self.finished if repeats else None)
        self.waiting = deque(self.groups.missing())

    @property
    def unfinished(self) -> bool:
        """Whether a group is still missing, one that was added to the prompts, too."""
        return len(self.groups) > 0 or self.groups.known < len(self.prompts)

    def grow(self) -> list[Prompt]:
        """Take in prompts that were added since; returns them."""
        added = self.groups.grow()
        self.waiting.extend(self.groups.missing_of(added))
        return [self.prompts[i] for i in added]

    def take(self, window: int) -> list[Request]:
        """Requests to begin with now, in the order of the prompts, so that at most `window` fly.

        It waits until a quarter of the window is free, since a message a sample would be one too many.
        """
        if len(self.flying) > window - max(1, window // 4):
            return []
        taken = []
        while self.waiting and len(self.flying) < window:
            i, k = self.waiting.popleft()
            request = Request(f"{self.name}.{i}.{k}", i, k, self._seed(i, k))
            self.flying[request.name] = request
            taken.append(request)
        return taken

    def give_back(self, names: Sequence[str] | None = None) -> None:
        """These requests, or all that fly, have to be drawn again, before those that still wait."""
        back = [self.flying.pop(name) for name in (list(self.flying) if names is None else names)]
        self.waiting.extendleft((request.prompt, request.sample) for request in reversed(back))

    def finish(self, name: str, completion: Completion) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Take a finished sample; yield the group that it completes. One that does not fly any more is ignored."""
        request = self.flying.pop(name, None)
        if request is not None:
            yield from self.groups.add(request.prompt, request.sample, completion)

    def _seed(self, i: int, k: int) -> int | None:
        if self.sampling.temperature == 0 or not self.seeded:
            return None
        return sample_seeds(self.sampling.seed, self.prompts[i].draw, self.sampling.samples)[k]


def sampling_arguments(sampling: Sampling, end_ids: list[int], token_ids: list[int]) -> dict[str, object]:
    """The sampling numbers by vLLM's names, without what differs from sample to sample.

    Args:
        sampling: The numbers.
        end_ids: What ends a completion.
        token_ids: All ids that have a token, where others have none; else empty.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": end_ids,
        **({"allowed_token_ids": token_ids} if sampling.mask_padding and token_ids else {}),
        **(
            {"stop": list(sampling.stop), "include_stop_str_in_output": True, "skip_special_tokens": False}
            if sampling.stop
            else {}
        ),
    }


Sample = tuple[list[int], list[float], str, list[tuple[str, int, int]]]
"""Tokens, log-probs, finish reason, and spans of one version of the weights each: its label (no number:
those that the engine loaded by itself), start, end."""
Outcome = Sample | Exception | None
"""What became of a sample; None: it was lost and has to be drawn again."""


class EngineDiedError(ChildProcessError):
    """The engine's process is gone or hangs; what it was sampling is lost."""


class Channel(Protocol):
    """What computes the samples of streams. A sample's name begins with that of its stream and a dot."""

    @property
    def context(self) -> int | None:
        """Longest prompt and completion in tokens."""
        ...

    @property
    def window(self) -> int:
        """Samples of one stream that may be computed or queued now."""
        ...

    def open(self, stream: str) -> None:
        """Make room for the outcomes of a stream."""
        ...

    def add(self, samples: Sequence[tuple[str, list[int], int | None]], arguments: Mapping[str, Any]) -> None:
        """Begin with samples.

        Args:
            samples: Name, prompt tokens and seed of each.
            arguments: As `sampling_arguments` gives them.
        """
        ...

    def next(self, stream: str) -> tuple[str, Outcome]:
        """Wait for a sample to end; its name and what became of it.

        Raises:
            EngineDiedError: if all that were computed are lost.
        """
        ...

    def close_stream(self, stream: str, flying: list[str]) -> None:
        """Forget a stream and abort its samples."""
        ...


class StreamingEngine(ABC):
    """The half of an `Engine` that draws samples; the other half has the channel and sends weights.

    Args:
        seeded: Fix each sample by seed, draw and number.
    """

    def __init__(self, seeded: bool) -> None:
        self.version, self.seeded = -1, seeded
        self._streams, self._prefix = itertools.count(), "s"

    @abstractmethod
    def channel(self, died: Channel | None = None, death: EngineDiedError | None = None) -> Channel:
        """What computes samples, or what is in the place of one that died."""

    def read_tokenizer(self, model: str) -> None:
        """Read what turns prompts into requests and tokens into text."""
        self.tokenizer = load_tokenizer(model)
        self.end_ids = end_token_ids(self.tokenizer, generation_end(model))
        self.token_ids = ids_with_token(model, self.tokenizer)

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: FinishedSamples | None = None
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Yield each group as soon as its last sample is finished; closing it aborts the others."""
        channel = self.channel()
        check_fits(prompts, sampling, channel.context)
        work = Work(f"{self._prefix}{next(self._streams)}", prompts, sampling, self.seeded, finished=finished)
        try:
            channel.open(work.name)
            while work.unfinished:
                try:
                    check_fits(work.grow(), sampling, channel.context)
                    self._feed(channel, work)
                    yield from self._take(channel, work)
                except EngineDiedError as death:
                    work.give_back()
                    channel = self.channel(channel, death)
                    channel.open(work.name)
        finally:
            channel.close_stream(work.name, list(work.flying))

    def _feed(self, channel: Channel, work: Work) -> None:
        """Begin with as many samples as there is room for."""
        if requests := work.take(channel.window):
            plain = [(request.name, list(work.prompts[request.prompt].token_ids), request.seed) for request in requests]
            channel.add(plain, sampling_arguments(work.sampling, self.end_ids, self.token_ids))

    def _take(self, channel: Channel, work: Work) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Wait for a sample to end; yield its group if it was the last."""
        name, outcome = channel.next(work.name)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            work.give_back([name])
            return
        tokens, logprobs, finish, spans = outcome
        versions = [int(text) if text.isdigit() else -1 for text, start, end in spans for _ in range(start, end)]
        yield from work.finish(name, completion_of(self.tokenizer, tokens, logprobs, finish, versions))
