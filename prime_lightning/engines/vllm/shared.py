"""One vLLM engine for several ranks of a machine, in the memory of all their GPUs or on GPUs of its own.

The first of the ranks owns the engine's process and sends the weights; the others draw their samples from it through
`vllm/remote.py`, with book-keeping, detokenization and verification of their own. Weights, sleep and wake are steps
that all ranks of the run take together; sampling is not.

It leaves out adapters, which come merged, and groups of ranks across machines.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from prime_lightning.engines.host_group import of_all_ranks, rank, together
from prime_lightning.engines.samples import Channel, EngineDiedError
from prime_lightning.engines.vllm.devices import own_gpu
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.engines.vllm.remote import Address, OwnerClient, ProcessProxy, share


class SharedVLLMEngine(VLLMEngine):
    """A `VLLMEngine` that neighbouring ranks share: ranks 0 to `ranks` - 1, the next ones another, and so on.

    Without `devices` it lies on the ranks' own GPUs, one part of the model on each, so `tensor_parallel` is `ranks`.

    Args:
        ranks: How many share one engine; None is `tensor_parallel`.
        **options: As of `VLLMEngine`; `lora_rank` must be null.

    Example:
        >>> SharedVLLMEngine(device="cpu", tensor_parallel=2).ranks
        2
    """

    def __init__(self, ranks: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.ranks = self.tensor_parallel if ranks is None else ranks
        if self.ranks < 1:
            raise ValueError(f"Expected `ranks` of at least 1, got {ranks}.")
        if self.cuda and self.devices is None and self.ranks != self.tensor_parallel:
            raise ValueError(
                f"Expected `tensor_parallel` {self.ranks} for an engine on the GPUs of {self.ranks} ranks, got "
                f"{self.tensor_parallel}. Give it `devices` of its own, or leave `ranks` out."
            )
        if self.lora_rank is not None:
            raise ValueError(f"Expected `lora_rank` null for an engine that ranks share, got {self.lora_rank}.")
        self.owner, self.owns = 0, True
        self._places: list[int] = []
        self._address: Address | None = None
        self._client: OwnerClient | None = None

    # ---- the Engine protocol

    @property
    def context(self) -> int | None:
        """As of a `VLLMEngine`, on all ranks."""
        return super().context if self._client is None else self._client.present().context

    def start(self, model: str) -> None:
        """Begin to load, at the rank that owns the engine; on all ranks.

        Raises:
            ValueError: on all of them, if one could not, or the ranks do not fit.
        """
        self.close()
        self._meet()
        gathered = together(lambda: self._begin(model))
        if not self.owns:
            self._client = OwnerClient(gathered[self.owner], self.owner)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send all weights, and compare a sample of them with what the engine then has; on all ranks.

        Raises:
            ValueError: on all of them, if a name or a shape does not fit, or one is missing.
            RuntimeError: on all of them, if an engine does not have what was sent.
        """
        weights = iter(weights)
        of_all_ranks()  # none of them still samples with the last ones
        together(lambda: self._send(weights, version))
        self.version, self._no_weights = version, False
        if self._can_sleep:
            torch.cuda.empty_cache()
            of_all_ranks()
            together(self._wake_cache)

    def sleep(self) -> None:
        """Give up memory of the ranks' GPUs, once none of them samples."""
        if self._can_sleep:
            of_all_ranks()
            together(super().sleep)

    def wake(self) -> None:
        """Take GPU memory back, once none of the ranks holds it for later."""
        if self._asleep:
            torch.cuda.empty_cache()
            of_all_ranks()
            together(super().wake)

    def close(self) -> None:
        """End the process, at the rank that owns it."""
        self._client = None
        super().close()

    def channel(self, died: Channel | None = None, death: EngineDiedError | None = None) -> Channel:
        """What draws samples: the process, wherever it is, or the one in the place of one that died."""
        if self._client is None:
            return super().channel(died, death)
        assert died is None or isinstance(died, ProcessProxy)
        return self._client.present(died, death)

    # ---- the ranks

    def _meet(self) -> None:
        """See who is there.

        Raises:
            ValueError: on all ranks, if they cannot be divided, or those of an engine are not on one machine.
        """
        places = of_all_ranks((socket.gethostname(), own_gpu() if self.cuda else -1))
        if len(places) % self.ranks:
            raise ValueError(
                f"Expected a number of ranks that {self.ranks} divides (`ranks` of an engine), got {len(places)}."
            )
        for first in range(0, len(places), self.ranks):
            those, group = f"ranks {first} to {first + self.ranks - 1}", places[first : first + self.ranks]
            hosts = sorted({host for host, _ in group})
            if len(hosts) > 1:
                raise ValueError(
                    f"Expected {those}, which share an engine, on one machine, got {hosts}. Each machine's number of "
                    "ranks must be a multiple of `ranks`."
                )
            if self.cuda and self.devices is None and len({*group}) < len(group):
                raise ValueError(
                    f"Expected {those}, which share an engine, on GPUs of their own, got the CUDA devices "
                    f"{[device for _, device in group]}. All ranks of a machine must see all their GPUs."
                )
        self.owner = rank() // self.ranks * self.ranks
        self.owns, self._prefix = self.owner == rank(), f"r{rank()}s"
        self._places = [device for _, device in places[self.owner : self.owner + self.ranks]]

    def _begin(self, model: str) -> Address | None:
        """Start the process and say where it can be reached, or get ready for that."""
        if self.owns:
            super().start(model)
            self._address = self._address or share(self)
            return self._address
        self._prepare(model)
        return None

    def _send(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        try:
            if self.owns:
                self._load(weights, version)
        finally:
            deque(weights, maxlen=0)  # which all ranks gather together

    def _call(self, method: str, **arguments: Any) -> None:
        if self.owns:
            super()._call(method, **arguments)

    def _devices(self) -> list[int]:
        if not self.owns:
            return []
        return self._places if self.devices is None else self.devices

    def _check_tensor_parallel(self) -> None:
        if self.devices is not None:
            super()._check_tensor_parallel()
