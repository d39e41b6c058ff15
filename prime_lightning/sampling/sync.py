"""The policy's weights on their way to the engine that samples with them.

A `PrimeModule` ends each iteration by sending them, through two doors of its data module: `sync` and `rest`. All that
happens behind the first one is `send`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from prime_lightning.engines import AdapterEngine, Engine
from prime_lightning.models.lora import adapter_config, adapter_parameters, merged_parameters


@dataclass(frozen=True)
class PolicyWeights:
    """The weights of a policy as engines may want them; what is sharded is gathered when it is asked for, one by one.

    All ranks must take the same ones to their end.
    """

    model: nn.Module
    """The causal LM, with or without adapters."""
    whole: Callable[[Tensor], Tensor] = Tensor.detach
    """Gathers a weight."""

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by their Hugging Face names, tied ones once, adapters merged."""
        return merged_parameters(self.model, self.whole)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters alone, by peft's names."""
        return adapter_parameters(self.model, self.whole)

    def adapter_config(self) -> dict[str, Any] | None:
        """What peft writes of the adapters; None without any."""
        return adapter_config(self.model)


@runtime_checkable
class WeightReceiver(Protocol):
    """What a `PrimeModule` needs of the data module that samples for it."""

    def sync(self, weights: PolicyWeights, version: int) -> None:
        """Sample with these weights from now on; version n is the policy after n iterations. All ranks call it.

        It is also called where nothing is new, before something is sampled.
        """
        ...

    def rest(self) -> None:
        """A batch is there: until the next `sync`, device memory belongs to the trainer."""
        ...


def weight_receiver(trainer: Any) -> Any:
    """The data module of a trainer, which must be a `WeightReceiver`.

    Raises:
        ValueError: if it is not, for it would go on sampling with the weights that it began with.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, WeightReceiver):
        raise ValueError(
            "Expected a data module that takes the policy's weights, by `sync(weights, version)` and `rest()` "
            f"(prime_lightning.sampling.sync), got {'none' if data is None else type(data).__name__}."
        )
    return data


def send(engine: Engine, weights: PolicyWeights, version: int) -> None:
    """Wake an engine, and give it the policy's weights unless it has this version; all ranks together.

    Raises:
        ValueError: if the engine wants adapters and the policy has none, or it does not take the weights.
    """
    tensors: Iterator[tuple[str, Tensor]] = iter(())
    adapted, stale = _adapters_for(engine, weights), engine.version != version
    if stale:
        tensors = weights.merged() if adapted is None else weights.adapters()
    try:
        engine.wake()
        if stale and adapted is None:
            engine.load_weights(tensors, version=version)
        elif stale:
            engine.load_adapters(adapted, tensors, version=version)  # type: ignore[attr-defined]
    finally:
        deque(tensors, maxlen=0)  # an engine that gave up must not leave other ranks waiting for this one


def _adapters_for(engine: Engine, weights: PolicyWeights) -> dict[str, Any] | None:
    """What an engine that computes with adapters is told of them; None for one that wants them merged."""
    if not isinstance(engine, AdapterEngine) or engine.lora_rank is None:
        return None
    config = weights.adapter_config()
    if config is None:
        raise ValueError(
            f"Expected a policy with adapters for an engine with `lora_rank` {engine.lora_rank}, got one without. "
            "Add --config conf/model/lora.yaml, or leave `lora_rank` out."
        )
    return config
