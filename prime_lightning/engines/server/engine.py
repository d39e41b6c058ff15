"""Sampling with `vllm serve` processes on this or other machines, by their URLs.

A server that dies is left out, and taken back with the present weights when it is well again; `server/fleet.py` draws
the samples. During a weight update nothing is in flight. Several ranks may share the servers: the first one sends
the weights, and all of them wait for it.

The servers need vLLM's development routes, which no API key guards: keep them on a private network (docs/vllm.md).
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import Tensor

from prime_lightning.engines.host_group import rank, together
from prime_lightning.engines.samples import Channel, EngineDiedError, StreamingEngine
from prime_lightning.engines.server.client import ServerClient, ServerDownError
from prime_lightning.engines.server.fleet import Fleet, Server, ServerChannel
from prime_lightning.engines.weights.transfer import HostSender, WeightCopy

PROBE = 5.0  # seconds between two looks at a dead server


class ServerEngine(StreamingEngine):
    """An `Engine` on one or more vLLM servers.

    Args:
        urls: Of the servers, such as `http://host:8000`.
        served_model: Name under which they serve the model; None is the only one.
        api_key_variable: Environment variable with the API key, if the servers want one.
        certificate: File with the authority of `https` servers; None is the system's.
        dtype: Of the servers' weights (their `--dtype`); `auto` takes what they report, which must be the same of all.
        in_flight: Samples of one rank that a server has at a time.
        transfer: How weights come: `host` (servers on this machine), `disk` (`shared_folder`), `nccl` (GPUs).
        shared_folder: A folder that trainer and servers see under the same path, for `disk`.
        address: Of this machine, as the servers reach it, for `nccl`.
        seeded: Fix each sample by seed, draw and number.
        start_timeout: Seconds until all servers must be well.
        stall_timeout: Seconds without a byte after which a server counts as dead.
        patience: Seconds to wait for one of them when all are dead.
    """

    def __init__(
        self,
        urls: list[str],
        served_model: str | None = None,
        api_key_variable: str = "VLLM_API_KEY",
        certificate: str | None = None,
        dtype: str = "auto",
        in_flight: int = 64,
        transfer: Literal["host", "disk", "nccl"] = "host",
        shared_folder: str | None = None,
        address: str = "127.0.0.1",
        seeded: bool = True,
        start_timeout: float = 600.0,
        stall_timeout: float = 300.0,
        patience: float = 600.0,
    ) -> None:
        if not urls or len(set(urls)) != len(urls):
            raise ValueError(f"Expected different server URLs, got {urls}.")
        if (transfer == "disk") != (shared_folder is not None):
            raise ValueError(
                f"Expected `shared_folder` with transfer `disk` only, got {transfer!r}, {shared_folder!r}."
            )
        super().__init__(seeded)
        key = os.environ.get(api_key_variable, "")
        self.servers = [Server(ServerClient(url, key, certificate, stall_timeout)) for url in urls]
        self.served_model, self.dtype = served_model, dtype
        self.transfer, self.shared_folder, self.address = transfer, shared_folder, address
        self.start_timeout = start_timeout
        self.copy: WeightCopy | None = None
        self._sender: Any = None
        self._channel = ServerChannel(self.servers, in_flight, patience)
        self._weights = threading.RLock()  # one transfer at a time
        self._closed = threading.Event()

    # ---- the Engine protocol

    @property
    def context(self) -> int | None:
        """Longest prompt and completion in tokens that all servers take."""
        return self._channel.context

    def start(self, model: str) -> None:
        """Wait until all servers are well, and see that they serve this model as training needs it.

        Raises:
            ValueError: if one is not there, or serves another model, tokenizer or kind of log-probs.
        """
        self.close()
        self.read_tokenizer(model)
        dtype = self.dtype
        for server in self.servers:
            server.introduce(self.served_model, self.tokenizer, dtype, self.transfer, self.start_timeout)
            dtype = server.dtype
        contexts = (server.context for server in self.servers if server.context is not None)
        self._channel.context = min(contexts, default=None)
        self.copy = WeightCopy(model, dtype, self.shared_folder)
        self._closed = threading.Event()
        threading.Thread(target=self._probe, args=(self._closed,), daemon=True).start()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send all weights to all servers that are well, and compare a sample of what they have then; on all ranks.

        Raises:
            ValueError: on all of them, if a name or a shape does not fit, or one is missing.
            RuntimeError: on all of them, if a server does not have what was sent.
        """
        assert self.copy is not None, "call `start` first"
        with self._weights, self._channel.held():
            well = together(lambda: self._send(iter(weights), version))[0]
            for server, is_well in zip(self.servers, well, strict=True):
                server.well = is_well
            self.version = self._channel.version = version

    def channel(self, died: Channel | None = None, death: EngineDiedError | None = None) -> ServerChannel:
        """The way to the servers, which is there whoever of them dies."""
        return self._channel

    def sleep(self) -> None:
        """Servers have GPUs of their own."""

    def wake(self) -> None:
        """Servers have GPUs of their own."""

    def close(self) -> None:
        """Give memory and shared file back; the servers stay."""
        self._closed.set()
        if self.copy is not None:
            self.copy.close()
        self.copy, self._sender, self._channel.version, self.version = None, None, -1, -1

    # ---- weights

    def _send(self, weights: Iterator[tuple[str, Tensor]], version: int) -> list[bool]:
        """Send them, if this rank is the one that does; returns which servers are well then."""
        assert self.copy is not None
        try:
            if rank() == 0:
                self._sender_of_all().send(self.copy.passing(weights, version))
        finally:
            deque(weights, maxlen=0)  # which all ranks gather together
        return [server.well for server in self.servers]

    def _sender_of_all(self) -> Any:
        """The weight transfer to all servers that are well; a change among them needs a new hand-shake."""
        assert self.copy is not None
        for server in self.servers:
            if not server.well and server.client.healthy():
                server.well = True
        fleet = Fleet([server for server in self.servers if server.well])
        if self._sender is None or not self._sender.client.same(fleet):
            if self.transfer == "nccl":
                from prime_lightning.engines.weights.cuda import sender_of  # imports vLLM into the trainer

                self._sender = sender_of("nccl", fleet, self.copy, fleet.workers(), self.address)
            else:
                self._sender = HostSender(fleet, self.copy)
        return self._sender

    def _probe(self, closed: threading.Event) -> None:
        """Look at dead servers now and then, in a thread, and take them back."""
        while not closed.wait(PROBE):
            for server in self.servers:
                if not server.well and self.transfer != "nccl" and server.client.healthy():
                    with self._weights:
                        self._take_back(server)

    def _take_back(self, server: Server) -> None:
        """Give a server that is well again the present weights; ranks that do not send any wait for them."""
        try:
            if self.copy is None:
                return  # closed
            if self.version >= 0 and rank() > 0:
                if server.client.get("/weight_info")["weight_version"] != str(self.version):
                    return
            elif self.version >= 0:
                if self.copy.version is None:
                    return  # there are no whole weights
                HostSender(Fleet([server], patient=True), self.copy).resend()
        except (ServerDownError, RuntimeError) as error:
            server.why = str(error)
            return
        server.well, self._sender = True, None
        warnings.warn(
            f"The server {server.client.url} is back, with the weights of version {self.version}.", stacklevel=2
        )
