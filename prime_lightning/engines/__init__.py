"""What the data module needs of something that samples: the `Engine` protocol.

Each backend is one file beside this one. A backend is chosen by import path in YAML, and nothing but that YAML
imports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from prime_lightning.rollout import Completion, Prompt, Sampling


@runtime_checkable
class Engine(Protocol):
    """Samples completions with weights that the trainer sends.

    The version of the weights counts finished iterations; -1 means that none were sent yet.
    """

    version: int

    def start(self, model: str) -> None:
        """Load a model by its Hugging Face id or folder; the constructor only keeps its arguments.

        Raises:
            ValueError: if there is no such model.
        """
        ...

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Yield each prompt with its `sampling.samples` completions as soon as all of them are finished, in any order.

        A sample is fixed by `sampling.seed`, the prompt's `draw` and the sample's number. Closing the iterator drops
        what is unfinished.

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
