"""What the data module needs of something that samples: the `Engine` protocol.

Each backend is one file beside this one. A backend is chosen by import path in YAML, and nothing but that YAML
imports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from prime_lightning.rollout import Completion, Prompt, Sampling

FinishedSamples = dict[int, dict[int, Completion]]
"""Finished samples of groups that are not whole, by the prompt's `draw` and the sample's number."""


@runtime_checkable
class Engine(Protocol):
    """Samples completions with weights that the trainer sends.

    The version of the weights counts finished iterations; -1 means that none were sent yet.
    """

    version: int

    @property
    def context(self) -> int | None:
        """Longest prompt and completion in tokens, once a model is loaded; None where that is not known."""
        ...

    def start(self, model: str) -> None:
        """Load a model by its Hugging Face id or folder; the constructor only keeps its arguments.

        Raises:
            ValueError: if there is no such model.
        """
        ...

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: FinishedSamples | None = None
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Yield each prompt with its `sampling.samples` completions as soon as all of them are finished, in any order.

        Prompts that are added to the list while the stream runs are drawn, too: the engine looks for them after each
        group that it has yielded. One that does not look ends its stream, and is asked for them in another.

        A sample is fixed by `sampling.seed`, the prompt's `draw` and the sample's number. Closing the iterator drops
        what is unfinished.

        Samples in `finished` are not drawn again. Every sample that ends is put there, and a group leaves it when it is
        yielded: what a closed stream leaves there can be given to the next one. Its draws must differ then. An engine
        whose samples are not fixed by seeds leaves it alone.

        Raises:
            ValueError: if a prompt and `max_tokens` do not fit the model's context.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over all weights of the policy, by their Hugging Face names.

        Raises:
            ValueError: if a name or a shape does not fit, or one is missing.
        """
        ...

    def sleep(self) -> None:
        """Give up device memory until `wake`; weights may be lost."""
        ...

    def wake(self) -> None:
        """Take device memory back."""
        ...

    def close(self) -> None:
        """Free everything; calling it twice is fine."""
        ...


@runtime_checkable
class AdapterEngine(Engine, Protocol):
    """An engine that can compute with LoRA adapters beside the weights of the model that it was started with."""

    lora_rank: int | None
    """Greatest rank; None wants adapters merged into the weights, as `load_weights` takes them."""

    def load_adapters(self, config: Mapping[str, Any], adapters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over the adapters of the policy, in place of `load_weights`.

        Args:
            config: As in peft's `adapter_config.json`.
            adapters: By peft's names.
            version: Of the policy.

        Raises:
            ValueError: if their rank is greater than `lora_rank`.
        """
        ...


def check_truncated_logprobs(engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
    """See that an engine's log-probs are of the truncated distribution (top-p, top-k) that it samples from.

    A top-p set of one token leaves no choice, so each log-prob must be 0.

    Raises:
        ValueError: if one is not.
    """
    lone = replace(sampling, samples=1, max_tokens=min(16, sampling.max_tokens), top_p=1e-6, top_k=0, stop=())
    for _, (done,) in engine.stream([prompt], lone):
        if min(done.logprobs) < -1e-3:
            raise ValueError(
                f"Expected log-probs of the truncated distribution, as `data.sampling` has top_p {sampling.top_p} and "
                f"top_k {sampling.top_k}; got {min(done.logprobs):.3g} nats for a token without alternative.\n"
                "Set top_p to 1 and top_k to 0, or let the engine give what vLLM calls `processed_logprobs`."
            )
