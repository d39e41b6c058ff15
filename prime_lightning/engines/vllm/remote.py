"""One rank's vLLM process in the hands of other ranks of the machine: calls over a local socket, answered in turn.

`ProcessServer` is at the rank that owns the process, with a thread for each thread that calls; `ProcessProxy` stands in
for the process elsewhere. The socket has no file, and who connects must know a key that only ranks of the run get.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any, Protocol

from prime_lightning.engines.vllm.process import Channel, EngineDiedError, EngineProcess

CONNECTING = 128  # ranks that may wait to be let in


class Owner(Protocol):
    """What starts the process, and starts it again."""

    @property
    def process(self) -> EngineProcess | None:
        """The process, if it was started."""
        ...

    def ready(self) -> EngineProcess:
        """The process, once its model is loaded."""
        ...

    def revive(self, died: Channel, death: EngineDiedError) -> EngineProcess:
        """The process in a dead one's place."""
        ...


class ProcessServer:
    """Lets other ranks of this machine draw samples from a process.

    Args:
        owner: Of the process.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.address = f"\0prime_lightning_{os.getpid()}_{secrets.token_hex(8)}"
        self.key = secrets.token_bytes(32)
        self._closed = threading.Event()
        self._listener = Listener(self.address, "AF_UNIX", backlog=CONNECTING)
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Let nobody in any more. Who is in learns of it from the process's end."""
        self._closed.set()
        with contextlib.suppress(OSError, EOFError):
            Client(self.address, "AF_UNIX").close()  # so that it looks up
        self._accepting.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OSError, EOFError):
                threading.Thread(target=self._answer, args=(self._listener.accept(),), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        """Do what one thread of another rank asks for, until it goes."""
        with contextlib.suppress(OSError, EOFError, AuthenticationError), connection:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            while True:
                pid, method, arguments = connection.recv()
                try:
                    answer = True, self._do(pid, method, arguments)
                except Exception as error:
                    answer = False, error
                connection.send(answer)

    def _do(self, pid: int | None, method: str, arguments: tuple[Any, ...]) -> Any:
        if method in ("ready", "revive"):
            process = self.owner.ready()
            if process.process.pid == pid:
                process = self.owner.revive(process, *arguments)
            return process.process.pid, process.info
        there = self.owner.process
        if there is None or there.process.pid != pid:
            raise EngineDiedError(f"The vLLM process {pid} is gone.")
        return getattr(there, method)(*arguments)


class OwnerClient:
    """Calls to the rank that owns a process; each thread has a connection of its own.

    Args:
        address: Of its `ProcessServer`.
        key: Of the same.
        owner: The rank.
    """

    def __init__(self, address: str, key: bytes, owner: int) -> None:
        self.address, self.key, self.owner = address, key, owner
        self._of_thread = threading.local()

    def process(self) -> ProcessProxy:
        """The process, once its model is loaded."""
        return ProcessProxy(self, *self.ask(None, "ready"))

    def revive(self, died: ProcessProxy, death: EngineDiedError) -> ProcessProxy:
        """The process in a dead one's place.

        Raises:
            EngineDiedError: if it died too often, or its rank is gone.
        """
        return ProcessProxy(self, *self.ask(died.pid, "revive", death))

    def ask(self, pid: int | None, method: str, *arguments: Any) -> Any:
        """Call a method there, of the process with this number.

        Raises:
            EngineDiedError: if that, or the rank that owns it, is gone.
        """
        try:
            if not hasattr(self._of_thread, "connection"):
                self._of_thread.connection = Client(self.address, "AF_UNIX", authkey=self.key)
            self._of_thread.connection.send((pid, method, arguments))
            done, answer = self._of_thread.connection.recv()
        except BaseException as error:
            self.close()  # an answer that nobody took would be taken for the next one
            if isinstance(error, OSError | EOFError):
                raise EngineDiedError(f"Rank {self.owner}, which owns the vLLM engine, is gone.") from None
            raise
        if not done:
            raise answer
        return answer

    def close(self) -> None:
        """Hang up, in this thread."""
        if hasattr(self._of_thread, "connection"):
            self._of_thread.connection.close()
            del self._of_thread.connection


class ProcessProxy:
    """The process of another rank, for a stream; see `EngineProcess`.

    Args:
        line: To that rank.
        pid: Number of the process.
        info: What it said of its model.
    """

    def __init__(self, client: OwnerClient, pid: int, info: dict[str, Any]) -> None:
        self.client, self.pid, self.info = client, pid, info

    def open(self, name: str) -> None:
        """Make room for the news of a stream."""
        with contextlib.suppress(EngineDiedError):  # `next` says so
            self.client.ask(self.pid, "open", name)

    def close_stream(self, name: str) -> None:
        """Forget it."""
        with contextlib.suppress(EngineDiedError):  # then it is forgotten
            self.client.ask(self.pid, "close_stream", name)

    def next(self, name: str, stall: float) -> tuple[Any, ...]:
        """The next news of a stream."""
        return self.client.ask(self.pid, "next", name, stall)  # type: ignore[no-any-return]

    def send(self, *message: Any) -> None:
        """Send a message; it is on its way when this returns."""
        self.client.ask(self.pid, "send", *message)
