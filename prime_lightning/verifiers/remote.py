"""A verifier behind HTTP: one class with time-out, retries and unknown.

It posts `{"prompt", "completion", "answer", "source", "kind"}` as JSON and expects `{"score": 0..1, "reason": "..."}`.
Protects: only the configured host is spoken to (no redirects, no proxies); answers are bounded in size and time.
Leaves out: what the service does with the text.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prime_lightning.rollout import Prompt, Verdict
from prime_lightning.verifiers.workers.pool import Pool

_MOST_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class HttpVerifier:
    """Where to ask, and how patiently. Prompts name it by its key in `Verifiers(remotes=...)`.

    Example:
        >>> HttpVerifier(url="http://127.0.0.1:9/grade", retries=0, seconds=0.5)(
        ...     Prompt(draw=0, token_ids=(), text="1+1=", kind="judge"), "2"
        ... ).known
        False
    """

    url: str
    """`http://` or `https://` address that takes the POST."""
    seconds: float = 30.0
    """Wall time for one attempt, from connecting to the last byte."""
    retries: int = 2
    """Further attempts after a failure of the connection or an answer of 429 or 5xx."""
    pause: float = 0.5
    """Seconds before the first further attempt; doubled each time."""
    connections: int = 8
    """Requests at a time."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent along, a token for example."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"Expected the `url` of a remote verifier to begin with http:// or https://, got {self.url!r}."
            )

    def __call__(self, prompt: Prompt, text: str) -> Verdict:
        """Ask and wait, on a connection of its own."""
        line = _Connection(self)
        try:
            return line.grade(prompt, text)
        finally:
            line.close()


class _Refused(Exception):  # noqa: N818  (what happened)
    """An answer that another attempt would not change."""


class _Connection:
    """One connection, kept open between requests: what the pool calls a worker."""

    def __init__(self, verifier: HttpVerifier) -> None:
        self._verifier = verifier
        self._connection: http.client.HTTPConnection | None = None
        self._killed = threading.Event()

    def grade(self, prompt: Prompt, text: str) -> Verdict:
        verifier, begun, trouble = self._verifier, time.perf_counter(), ""
        body = json.dumps(
            {
                "prompt": prompt.text,
                "completion": text,
                "answer": prompt.answer,
                "source": prompt.source,
                "kind": prompt.kind,
            }
        ).encode()
        for attempt in range(verifier.retries + 1):
            if attempt and self._killed.wait(verifier.pause * 2 ** (attempt - 1)):
                break
            try:
                said = self._ask(body)
                seconds = time.perf_counter() - begun
                return Verdict.of_score(float(said["score"]), reason=str(said.get("reason", "")), seconds=seconds)
            except _Refused as error:
                trouble = str(error)
                break
            except (OSError, http.client.HTTPException) as error:
                trouble = repr(error)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                trouble = f"an answer without a score ({error!r})"
                break
            finally:
                if trouble:
                    self._hang_up()
        return Verdict.unknown(f"remote verifier failed: {trouble or 'closed'}", seconds=time.perf_counter() - begun)

    def _ask(self, body: bytes) -> Any:
        deadline = time.monotonic() + self._verifier.seconds
        parts = urlsplit(self._verifier.url)
        if self._connection is None:
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            self._connection = kind(parts.hostname or "", parts.port, timeout=self._verifier.seconds)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._connection.request("POST", target, body, {"Content-Type": "application/json", **self._verifier.headers})
        response = self._connection.getresponse()
        content = b""
        while part := response.read1(4096):
            content += part
            if len(content) > _MOST_BYTES:
                raise _Refused(f"an answer of more than {_MOST_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError("the answer came too slowly")
        if response.status == 429 or response.status >= 500:
            raise OSError(f"HTTP {response.status}")
        if response.status != 200:
            raise _Refused(f"HTTP {response.status}")
        return json.loads(content)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def kill(self) -> None:
        self._killed.set()
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(2)

    def close(self) -> None:
        self._hang_up()


class RemoteGrader:
    """Asks one remote verifier from as many threads as it has connections.

    Args:
        verifier: Whom.
        pending: Completions that may wait before `grade` blocks.
    """

    def __init__(self, verifier: HttpVerifier, *, pending: int) -> None:
        self._pool = Pool(lambda: _Connection(verifier), workers=verifier.connections, pending=pending)

    def grade(self, prompt: Prompt, text: str) -> Future[Verdict]:
        """The remote verdict; unknown when it cannot be had."""
        return self._pool.submit(lambda line: line.grade(prompt, text))

    def close(self) -> None:
        """Break off what runs. Idempotent."""
        self._pool.close()
