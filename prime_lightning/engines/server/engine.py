"""Sampling with `vllm serve` processes on this or other machines, by their URLs.

Each sample is one streamed request to `/v1/completions`, given to the server with the fewest. A server that dies is
left out, its samples are drawn again elsewhere, and it is taken back with the present weights when it is well again.
During a weight update nothing is in flight: what was, is cut there and goes on from its last token with the new
weights, so that each token's version is known. Several ranks may share the servers: the first one sends the weights,
and all of them wait for it.

The servers need vLLM's development routes, which no API key guards: keep them on a private network (docs/vllm.md).
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from torch import Tensor

from prime_lightning.engines import FinishedSamples
from prime_lightning.engines.host_group import of_all_ranks, rank, together
from prime_lightning.engines.samples import (
    Request,
    Work,
    check_fits,
    completion_of,
    end_token_ids,
    generation_end,
    sampling_arguments,
)
from prime_lightning.engines.server.client import SampleCall, ServerClient, ServerDownError
from prime_lightning.engines.server.fleet import Fleet, Server
from prime_lightning.engines.weights.transfer import HostSender, WeightCopy
from prime_lightning.models.pretrained import ids_with_token, load_tokenizer
from prime_lightning.rollout import Completion, Prompt, Sampling

PIECE = 32  # tokens a message; the last message comes at once
PROBE = 5.0  # seconds between two looks at a dead server
LETTING_GO = 3.0  # seconds that servers have to abort what they compute, before it is cut


class ServerEngine:
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
        self.version = -1
        self.context: int | None = None
        key = os.environ.get(api_key_variable, "")
        self.servers = [Server(ServerClient(url, key, certificate, stall_timeout)) for url in urls]
        self.served_model, self.dtype, self.in_flight, self.seeded = served_model, dtype, in_flight, seeded
        self.transfer, self.shared_folder, self.address = transfer, shared_folder, address
        self.start_timeout, self.patience = start_timeout, patience
        self.copy: WeightCopy | None = None
        self._sender: Any = None
        self._streams = itertools.count()
        self._turn = threading.Condition()  # guards what follows, and the servers' counters
        self._updating = False
        self._calls: dict[str, SampleCall] = {}
        self._weights = threading.RLock()  # one transfer at a time
        self._closed = threading.Event()

    # ---- the Engine protocol

    def start(self, model: str) -> None:
        """Wait until all servers are well, and see that they serve this model as training needs it.

        Raises:
            ValueError: if one is not there, or serves another model, tokenizer or kind of log-probs.
        """
        self.close()
        self.tokenizer = load_tokenizer(model)
        self.end_ids = end_token_ids(self.tokenizer, generation_end(model))
        self.token_ids = ids_with_token(model, self.tokenizer)
        dtype = self.dtype
        for server in self.servers:
            server.introduce(self.served_model, self.tokenizer, dtype, self.transfer, self.start_timeout)
            dtype = server.dtype
        self.context = min((server.context for server in self.servers if server.context is not None), default=None)
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
        with self._weights:
            self._hold()
            try:
                well = together(lambda: self._send(iter(weights), version))[0]
                for server, is_well in zip(self.servers, well, strict=True):
                    server.well = is_well
                self.version = version
            finally:
                self._release()

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: FinishedSamples | None = None
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Yield each group as soon as its last sample is finished; closing it aborts the others."""
        check_fits(prompts, sampling, self.context)
        work = Work(f"s{next(self._streams)}", prompts, sampling, self.seeded, finished=finished)
        outcomes: queue.SimpleQueue[tuple[Request, Completion | Exception]] = queue.SimpleQueue()
        pool = ThreadPoolExecutor(self.in_flight * len(self.servers))
        try:
            while work.unfinished:
                check_fits(work.grow(), sampling, self.context)
                for request in work.take(self._room()):
                    pool.submit(self._run, work, request, outcomes)
                try:
                    request, outcome = outcomes.get(timeout=1.0)
                except queue.Empty:
                    continue
                yield from self._settle(work, request, outcome)
        finally:
            with self._turn:
                work.closed = True
            self._cut(list(work.flying))
            pool.shutdown(wait=True, cancel_futures=True)

    def sleep(self) -> None:
        """Servers have GPUs of their own."""

    def wake(self) -> None:
        """Servers have GPUs of their own."""

    def close(self) -> None:
        """Give memory and shared file back; the servers stay."""
        self._closed.set()
        if self.copy is not None:
            self.copy.close()
        self.copy, self._sender, self.version = None, None, -1

    # ---- samples

    def _room(self) -> int:
        """How many samples may fly; waits where no server is well."""
        deadline = time.monotonic() + self.patience
        while not (alive := [server for server in self.servers if server.well]):
            if time.monotonic() > deadline:
                raise ServerDownError(
                    f"Expected one of {[server.client.url for server in self.servers]} to be well again within "
                    f"{self.patience:g} s (`patience`), got none. Last: {self.servers[0].why}"
                )
            time.sleep(1.0)
        return self.in_flight * len(alive)

    def _settle(
        self, work: Work, request: Request, outcome: Completion | Exception
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        if isinstance(outcome, ServerDownError):
            work.give_back([request.name])
        elif isinstance(outcome, Exception):
            raise outcome
        else:
            yield from work.finish(request.name, outcome)

    def _run(self, work: Work, request: Request, outcomes: queue.SimpleQueue[Any]) -> None:
        """Draw one sample, in a thread."""
        try:
            outcomes.put((request, self._sample(work, request)))
        except Exception as error:
            outcomes.put((request, error))

    def _sample(self, work: Work, request: Request) -> Completion:
        """Draw one sample; go on from its last token after each weight update that cuts it."""
        prompt, sampling = work.prompts[request.prompt], work.sampling
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        while True:
            body = self._body(prompt, sampling, tokens, request.seed)
            server, call, version = self._begin(work, request.name, body)
            finish = None
            try:
                for choice in call.pieces():
                    tokens += choice["token_ids"]
                    logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
                    finish = choice.get("finish_reason") or finish
            except ServerDownError as error:
                if not call.cut_off:
                    server.fail(error)
                raise
            finally:
                self._end(request.name, server)
            versions += [version] * (len(tokens) - len(versions))
            if finish not in (None, "abort"):  # None: aborted before its first token
                return completion_of(self.tokenizer, tokens, logprobs, finish, versions)
            if version == self.version and not self._updating:
                raise ServerDownError(f"{server.client.url} aborted a sample for no reason of ours")

    def _body(self, prompt: Prompt, sampling: Sampling, tokens: list[int], seed: int | None) -> dict[str, Any]:
        arguments = sampling_arguments(sampling, self.end_ids, self.token_ids)
        arguments["max_tokens"] = sampling.max_tokens - len(tokens)
        return {
            **arguments,
            "model": self.served_model,
            "prompt": [*prompt.token_ids, *tokens],
            "seed": None if seed is None else seed ^ len(tokens),
            "logprobs": 0,
            "repetition_penalty": 1.0,  # the server may have defaults of the model's
            "min_p": 0.0,
            "stream": True,
            "stream_interval": PIECE,
            "return_token_ids": True,
        }

    def _begin(self, work: Work, name: str, body: dict[str, Any]) -> tuple[Server, SampleCall, int]:
        """Take a place at the server with the fewest samples, and the version of its weights."""
        with self._turn:
            self._turn.wait_for(lambda: not self._updating)
            alive = [server for server in self.servers if server.well]
            if not alive or work.closed:
                raise ServerDownError("no server is well, or nobody waits any more")
            server = min(alive, key=lambda server: server.samples)
            server.samples += 1
            call = self._calls[name] = SampleCall(server.client, body | {"model": server.model})
            return server, call, self.version

    def _end(self, name: str, server: Server) -> None:
        with self._turn:
            server.samples -= 1
            self._calls.pop(name, None)
            self._turn.notify_all()

    def _cut(self, names: Sequence[str]) -> None:
        with self._turn:
            calls = [self._calls[name] for name in names if name in self._calls]
        for call in calls:
            call.cut()

    # ---- weights

    def _hold(self) -> None:
        """Stop sampling: servers abort what they compute, and what a server does not let go is cut."""
        with self._turn:
            self._turn.wait_for(lambda: not self._updating)
            self._updating = True
        of_all_ranks()  # no rank begins a sample from here on
        if rank() == 0:
            Fleet(self.servers).pause()
        with self._turn:
            self._turn.wait_for(lambda: not self._calls, timeout=LETTING_GO)
        self._cut(list(self._calls))
        with self._turn:
            self._turn.wait_for(lambda: not self._calls, timeout=LETTING_GO)
        of_all_ranks()  # and none of any rank is in flight

    def _release(self) -> None:
        if rank() == 0:
            Fleet(self.servers).resume()
        with self._turn:
            self._updating = False
            self._turn.notify_all()

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
