"""One rank's vLLM process in the hands of other ranks of the machine: they have its address, and call it by that.

The calls go through `multiprocessing.managers`, answered at the rank that owns the process in a thread for each thread
that calls. The socket has no file, and who connects must know a key that only ranks of the run get.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.managers import BaseManager
from typing import Any

from prime_lightning.engines.samples import EngineDiedError, Outcome
from prime_lightning.engines.vllm.engine import VLLMEngine

Address = tuple[str, bytes]
"""Of a socket, and its key."""


class Door:
    """What other ranks may ask of the rank that owns a process."""

    def __init__(self, owner: VLLMEngine) -> None:
        self.owner = owner

    def present(self, died: int | None, death: EngineDiedError | None) -> tuple[int, int, int]:
        """What a `ProcessProxy` knows of the process, once its model is loaded; of another than the one that died."""
        process = self.owner.ready()
        if death is not None and process.process.pid == died:
            process = self.owner.revive(process, death)
        return process.process.pid, process.context, process.window

    def ask(self, pid: int, method: str, *arguments: Any) -> Any:
        """Call a method of the process with this number."""
        process = self.owner.process
        if process is None or process.process.pid != pid:
            raise EngineDiedError(f"The vLLM process {pid} is gone.")
        return getattr(process, method)(*arguments)


def share(owner: VLLMEngine) -> Address:
    """Let other ranks of this machine reach a rank's process, for as long as that rank lives."""
    address = f"\0prime_lightning_{os.getpid()}_{secrets.token_hex(8)}", secrets.token_bytes(32)
    server = _manager(address, lambda: Door(owner)).get_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return address


def _manager(address: Address, door: Callable[[], Door] | None = None) -> Any:
    class Manager(BaseManager):
        """Of one rank: what is registered belongs to the class."""

    Manager.register("door", door, exposed=("present", "ask"))
    return Manager(*address)


class OwnerClient:
    """The way to the rank that owns a process.

    Args:
        address: As `share` gave it there.
        owner: The rank.
    """

    def __init__(self, address: Address, owner: int) -> None:
        manager = _manager(address)
        manager.connect()
        self._door, self.owner = manager.door(), owner

    def present(self, died: ProcessProxy | None = None, death: EngineDiedError | None = None) -> ProcessProxy:
        """The process, once its model is loaded, or the one in a dead one's place.

        Raises:
            EngineDiedError: if it died too often, or its rank is gone.
        """
        return ProcessProxy(self, *self.call("present", died and died.pid, death))

    def call(self, method: str, *arguments: Any) -> Any:
        """Ask that rank.

        Raises:
            EngineDiedError: if its process, or itself, is gone.
        """
        try:
            return getattr(self._door, method)(*arguments)
        except BaseException as error:
            if line := vars(self._door._tls).pop("connection", None):
                line.close()  # an answer that nobody took would be taken for the next one
            if isinstance(error, OSError | EOFError) and not isinstance(error, EngineDiedError):
                raise EngineDiedError(f"Rank {self.owner}, which owns the vLLM engine, is gone.") from None
            raise


class ProcessProxy:
    """The process of another rank, as a `Channel`; see `EngineProcess`.

    Args:
        client: The way to that rank.
        pid: Number of the process.
        context: See `Channel`.
        window: Likewise.
    """

    def __init__(self, client: OwnerClient, pid: int, context: int, window: int) -> None:
        self.client, self.pid, self.context, self.window = client, pid, context, window

    def open(self, stream: str) -> None:
        """Make room for the outcomes of a stream."""
        with contextlib.suppress(EngineDiedError):  # `next` says so
            self.client.call("ask", self.pid, "open", stream)

    def add(self, samples: Sequence[tuple[str, list[int], int | None]], arguments: Mapping[str, Any]) -> None:
        """Begin with samples; they are on their way when this returns."""
        self.client.call("ask", self.pid, "add", samples, arguments)

    def next(self, stream: str) -> tuple[str, Outcome]:
        """Wait for a sample to end."""
        return self.client.call("ask", self.pid, "next", stream)  # type: ignore[no-any-return]

    def close_stream(self, stream: str, flying: list[str]) -> None:
        """Forget a stream and abort its samples."""
        with contextlib.suppress(EngineDiedError):  # then it is forgotten
            self.client.call("ask", self.pid, "close_stream", stream, flying)
