"""Book-keeping of one stream: which samples wait, which are being computed, which groups are whole.

Shared by the engines that draw samples elsewhere; nothing here knows who does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prime_lightning.engines import FinishedSamples
from prime_lightning.engines.samples import Groups, sample_seeds
from prime_lightning.rollout import Completion, Prompt, Sampling


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
    closed: bool = False
    """Nobody waits for the rest."""
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
