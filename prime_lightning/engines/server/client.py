"""One `vllm serve` process over HTTP: samples as they stream, health, and the control calls of a weight transfer.

A server that cannot be reached, or fails, is a `ServerDownError`; one that refuses what it
was asked is a ValueError.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from prime_lightning.engines.weights.transfer import joined


class ServerDownError(ConnectionError):
    """A server does not answer, or not as it should."""


class ServerClient:
    """Talks to one server; may be used by several threads.

    Args:
        url: Such as `http://host:8000`; `https` checks the certificate.
        api_key: Sent as a bearer token, if not empty.
        certificate: File with the authority that signed the server's certificate; None is the system's own.
        timeout: Seconds without a byte.
    """

    def __init__(self, url: str, api_key: str = "", certificate: str | None = None, timeout: float = 300.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"Expected server URLs such as 'http://host:8000', got {url!r}.")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._host, self._port, self._root = parts.hostname, parts.port, parts.path.rstrip("/")
        self._tls = ssl.create_default_context(cafile=certificate) if parts.scheme == "https" else None
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str, timeout: float | None = None) -> Any:
        """Ask for JSON; None if the answer has no body."""
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """Send JSON and get JSON, or None."""
        return self._ask("POST", path, body or {}, timeout)

    def healthy(self, timeout: float = 5.0) -> bool:
        """Whether the server says that it is well."""
        try:
            self.check(timeout)
        except (ServerDownError, ValueError):
            return False
        return True

    def check(self, timeout: float = 5.0) -> None:
        """See that the server is well.

        Raises:
            ServerDownError: if it is not there, or not yet.
            ValueError: if something answers that is no vLLM server.
        """
        try:
            self.get("/health", timeout)
        except ValueError as error:
            raise ValueError(
                f"Expected a vLLM server at {self.url}, got the answer of another program: {error}\n"
                "Its port is in use by that one: correct `urls`, or start the server on a free port (`--port`)."
            ) from None

    def read_back(self, columns: dict[str, int]) -> dict[str, list[float]]:
        """Values of the server's own weights, see `VLLMWorker.prime_read_back`."""
        body = {"method": "prime_read_back", "kwargs": {"columns": columns}}
        return joined(self.post("/collective_rpc", body)["results"])

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout: float | None) -> Any:
        with contextlib.closing(self.connect(timeout)) as connection:
            raw = self.answer(connection, method, path, body).read()
        return json.loads(raw) if raw else None

    def connect(self, timeout: float | None) -> http.client.HTTPConnection:
        """A connection that is opened by its first request."""
        wait = timeout or self.timeout
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=wait)
        return http.client.HTTPSConnection(self._host, self._port, timeout=wait, context=self._tls)

    def answer(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> http.client.HTTPResponse:
        """The response to a request; raises where the server is down, or refuses."""
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, self._root + quote(path, safe="/?=&"), payload, self._headers)
            response = connection.getresponse()
            if response.status < 400:
                return response
            said = response.read(2000).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise ServerDownError(f"{self.url}{path}: {error or type(error).__name__}") from None
        if response.status in (408, 425, 429) or response.status >= 500:
            raise ServerDownError(f"{self.url}{path} answered {response.status}: {said}")
        raise ValueError(f"{self.url}{path} refused ({response.status}): {said}")


class SampleCall:
    """One completion that a server streams; another thread may cut it off.

    Args:
        client: The server.
        body: The request, for `/v1/completions`.
    """

    def __init__(self, client: ServerClient, body: dict[str, Any]) -> None:
        self.client, self.body = client, body
        self.cut_off = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def pieces(self) -> Iterator[dict[str, Any]]:
        """The choices as they come, until the server is done.

        Raises:
            ServerDownError: if the server breaks off, or the call is cut.
            ValueError: if the server refuses the request.
        """
        connection = self.client.connect(None)
        try:
            connection.connect()
            with self._lock:
                self._socket = connection.sock
                if self.cut_off:
                    raise ServerDownError(f"{self.client.url}: cut off")
            yield from self._events(self.client.answer(connection, "POST", "/v1/completions", self.body))
        except (OSError, http.client.HTTPException, json.JSONDecodeError, AttributeError) as error:
            raise ServerDownError(f"{self.client.url}: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def cut(self) -> None:
        """Close the connection, which aborts the sample on the server."""
        with self._lock:
            self.cut_off = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """Server-sent events: lines `data: {...}`, the last of them `data: [DONE]`."""
        while line := response.readline():
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if not line.startswith(b"data:"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise ServerDownError(f"{self.client.url} failed: {event['error']}")
            yield from event["choices"]
        raise ServerDownError(f"{self.client.url} broke off")
