"""Several servers: which of them are well, the control calls of a weight transfer to all at once, and their samples.

Each sample is one streamed request, given to the server with the fewest. A server that fails is left out, and its
samples are drawn again elsewhere. One that a weight update cuts goes on from its last token with the new weights, so
that each token's version is known.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from prime_lightning.engines.host_group import of_all_ranks, rank
from prime_lightning.engines.samples import Outcome, Sample
from prime_lightning.engines.server.client import SampleCall, ServerClient, ServerDownError

PIECE = 32  # tokens a message; the last message comes at once
LETTING_GO = 10.0  # seconds that servers have to abort what they compute, before it is cut
AGAIN = 0.25  # seconds between two calls to abort it


class Server:
    """One server and what the trainer knows of it."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self.well = False
        self.why = "it was not asked yet"
        self.model = self.dtype = ""
        self.context: int | None = None
        self.samples = 0

    def introduce(
        self, wanted: str | None, tokenizer: PreTrainedTokenizerBase, dtype: str, transfer: str, timeout: float
    ) -> None:
        """Wait for the server and check that it serves what training needs; take note of its context.

        Raises:
            ValueError: if it does not come, or serves something else; the message says what to change.
        """
        self._wait(timeout)
        served = {card["id"]: card for card in self.client.get("/v1/models")["data"]}
        if wanted is None and len(served) > 1:
            raise ValueError(f"Expected `served_model` to be one of {[*served]} at {self.client.url}, got none.")
        if wanted is not None and wanted not in served:
            raise ValueError(f"Expected {self.client.url} to serve {wanted!r} (`served_model`), got {[*served]}.")
        self.model = wanted or next(iter(served))
        self._check_tokenizer(tokenizer)
        self._check_config(dtype, "nccl" if transfer == "nccl" else "prime_host")
        self.well, self.context = True, served[self.model].get("max_model_len")

    def _wait(self, timeout: float) -> None:
        """Wait until the server is well."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.client.check()
                return
            except ServerDownError as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"Expected a vLLM server at {self.client.url}, got no healthy answer in {timeout:g} s "
                        f"({error}).\nStart it as docs/vllm.md says, or correct `urls`."
                    ) from None
            time.sleep(1.0)

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Both must read the same text as the same tokens."""
        text = "".join(tokenizer.convert_ids_to_tokens([*range(min(200, len(tokenizer)))])) + "2+3*(4-1)=11;\n#7"
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        theirs = self.client.post("/tokenize", body)["tokens"]
        if list(ours) != list(theirs):
            raise ValueError(
                f"Expected {self.client.url} to have the trainer's tokenizer, got {theirs[:8]} ... for a text of "
                f"tokens {list(ours)[:8]} .... Serve the folder or id that is `model.policy`."
            )

    def _check_config(self, dtype: str, backend: str) -> None:
        """The server must be started for training."""
        try:
            config = self.client.get("/server_info?config_format=json")["vllm_config"]
        except ValueError:
            raise ValueError(
                f"Expected {self.client.url} with vLLM's development routes, got none. Start it with "
                "VLLM_SERVER_DEV_MODE=1 and the options in docs/vllm.md."
            ) from None
        found = {
            "--logprobs-mode": config["model_config"]["logprobs_mode"],
            "--dtype": str(config["model_config"]["dtype"]).removeprefix("torch."),
            "--weight-transfer-config": (config.get("weight_transfer_config") or {}).get("backend"),
        }
        self.dtype = found["--dtype"] if dtype == "auto" else dtype
        expected = {"--logprobs-mode": "processed_logprobs", "--dtype": self.dtype, "--weight-transfer-config": backend}
        wrong = {name: value for name, value in found.items() if value != expected[name]}
        if wrong:
            raise ValueError(
                f"Expected {self.client.url} to run with { {name: expected[name] for name in wrong} }, got {wrong}. "
                "Start it with the options in docs/vllm.md."
            )

    def fail(self, error: Exception) -> None:
        """Leave it out from now on."""
        if self.well:
            warnings.warn(f"A server is left out, and its samples are drawn elsewhere: {error}", stacklevel=2)
        self.well, self.why = False, str(error)


class Fleet:
    """The control calls of a weight transfer, each made to all servers at the same time.

    A server that fails is left out; if all fail, so does the call.

    Args:
        servers: All of them; calls are made to those that are well.
        patient: Call also those that are not.
    """

    def __init__(self, servers: Sequence[Server], patient: bool = False) -> None:
        self.servers, self.patient = list(servers), patient

    def same(self, other: Fleet) -> bool:
        """Whether these are the same servers, all of them still well."""
        return self.servers == other.servers and all(server.well for server in self.servers)

    def workers(self) -> int:
        """Processes that hold the servers' models."""
        return sum(size for size in self._sizes())

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Shake hands; by NCCL, each server's workers have ranks behind those of the server before."""
        if "rank_offset" not in init_info:
            self._each(lambda server: server.client.post("/init_weight_transfer_engine", {"init_info": init_info}))
            return
        offsets, offset = {}, int(init_info["rank_offset"])
        for server, size in zip(self.servers, self._sizes(), strict=True):
            offsets[server.client.url] = offset
            offset += size
        self._each(
            lambda server: server.client.post(
                "/init_weight_transfer_engine", {"init_info": init_info | {"rank_offset": offsets[server.client.url]}}
            )
        )

    def start_weight_update(self) -> None:
        """Make the models ready to take weights."""
        self._each(lambda server: server.client.post("/start_weight_update"))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one piece."""
        self._each(lambda server: server.client.post("/update_weights", {"update_info": update_info}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Take the weights into use, and drop what was cached with the old ones."""

        def finish(server: Server) -> None:
            server.client.post("/finish_weight_update", {"weight_version": weight_version})
            if not server.client.post("/reset_prefix_cache?reset_running_requests=true")["success"]:
                raise ServerDownError(f"{server.client.url} did not reset its prefix cache")

        self._each(finish)

    def read_back(self, columns: dict[str, int]) -> dict[str, list[float]]:
        """Values of the servers' own weights, which must be the same on all of them."""
        read = self._each(lambda server: server.client.read_back(columns))
        if any(values != read[0] for values in read):
            raise RuntimeError(f"Expected the same weights on {[s.client.url for s in self.servers]}, got others.")
        return read[0]  # type: ignore[no-any-return]

    def pause(self) -> None:
        """Abort what is computed, and begin nothing new."""
        self._each(lambda server: server.client.post("/pause?mode=abort"), needed=False)

    def resume(self) -> None:
        """Go on."""
        self._each(lambda server: server.client.post("/resume"), needed=False)

    def _sizes(self) -> list[int]:
        return [int(server.client.get("/get_world_size")["world_size"]) for server in self.servers]

    def _each(self, call: Callable[[Server], Any], needed: bool = True) -> list[Any]:
        """Answers of the servers that are well; those that fail are left out from now on."""
        alive = [server for server in self.servers if server.well or self.patient]

        def attempt(server: Server) -> tuple[bool, Any]:
            try:
                return True, call(server)
            except (ServerDownError, ValueError) as error:
                server.fail(error)
                return False, error

        with ThreadPoolExecutor(max(1, len(alive))) as pool:
            answers = list(pool.map(attempt, alive))
        if needed and not any(ok for ok, _ in answers):
            raise ServerDownError(f"All servers failed: {[str(why) for _, why in answers] or self.servers[0].why}")
        return [answer for ok, answer in answers if ok]


class ServerChannel:
    """A `Channel` to servers.

    Args:
        servers: All of them; samples go to those that are well.
        in_flight: Samples of one rank that a server has at a time.
        patience: Seconds to wait for one of them when all are dead.
    """

    def __init__(self, servers: Sequence[Server], in_flight: int, patience: float) -> None:
        self.servers, self.in_flight, self.patience = servers, in_flight, patience
        self.context: int | None = None
        self.version = -1
        self._turn = threading.Condition()  # guards what follows, and the servers' counters
        self._updating = False
        self._calls: dict[str, SampleCall] = {}
        self._streams: dict[str, tuple[ThreadPoolExecutor, queue.SimpleQueue[tuple[str, Outcome]]]] = {}

    @property
    def window(self) -> int:
        """How many samples may fly; waits where no server is well.

        Raises:
            ServerDownError: if none is well again in time.
        """
        deadline = time.monotonic() + self.patience
        while not (alive := [server for server in self.servers if server.well]):
            if time.monotonic() > deadline:
                raise ServerDownError(
                    f"Expected one of {[server.client.url for server in self.servers]} to be well again within "
                    f"{self.patience:g} s (`patience`), got none. Last: {self.servers[0].why}"
                )
            time.sleep(1.0)
        return self.in_flight * len(alive)

    def open(self, stream: str) -> None:
        """Make room for the outcomes of a stream."""
        self._streams[stream] = ThreadPoolExecutor(self.in_flight * len(self.servers)), queue.SimpleQueue()

    def add(self, samples: Sequence[tuple[str, list[int], int | None]], arguments: Mapping[str, Any]) -> None:
        """Begin with samples, each in a thread."""
        for name, prompt, seed in samples:
            pool, mail = self._streams[_stream_of(name)]
            pool.submit(self._run, mail, name, prompt, seed, arguments)

    def next(self, stream: str) -> tuple[str, Outcome]:
        """Wait for a sample to end."""
        return self._streams[stream][1].get()

    def close_stream(self, stream: str, flying: list[str]) -> None:
        """Forget a stream and abort its samples."""
        with self._turn:
            pool, _ = self._streams.pop(stream)
        self._cut(flying)
        pool.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While nothing is in flight, of any rank: servers abort what they compute; what they do not let go is cut.

        A request that reaches a paused server waits there, and the next pause aborts it. So pauses are repeated.
        """
        with self._turn:
            self._turn.wait_for(lambda: not self._updating)
            self._updating = True
        of_all_ranks()  # no rank begins a sample from here on
        deadline = time.monotonic() + LETTING_GO
        Fleet(self.servers).pause()
        while not self._none_within(AGAIN) and time.monotonic() < deadline:
            Fleet(self.servers).pause()
        self._cut(list(self._calls))
        self._none_within(LETTING_GO)
        of_all_ranks()  # and none of any rank is in flight
        try:
            yield
        finally:
            if rank() == 0:
                Fleet(self.servers).resume()
            with self._turn:
                self._updating = False
                self._turn.notify_all()

    def _none_within(self, seconds: float) -> bool:
        """Wait until nothing of this rank is in flight; whether that came."""
        with self._turn:
            return self._turn.wait_for(lambda: not self._calls, timeout=seconds)

    def _run(self, mail: queue.SimpleQueue[tuple[str, Outcome]], name: str, *request: Any) -> None:
        outcome: Outcome = None
        try:
            outcome = self._sample(name, *request)
        except ServerDownError:
            pass  # it was lost
        except Exception as error:
            outcome = error
        mail.put((name, outcome))

    def _sample(self, name: str, prompt: list[int], seed: int | None, arguments: Mapping[str, Any]) -> Sample:
        """Draw one sample; go on from its last token after each weight update that cuts it."""
        tokens: list[int] = []
        logprobs: list[float] = []
        spans: list[tuple[str, int, int]] = []
        while True:
            server, call, version = self._begin(name, _body(prompt, tokens, seed, arguments))
            finish, start = None, len(tokens)
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
                self._end(name, server)
            spans.append((str(version), start, len(tokens)))
            if finish not in (None, "abort"):  # None: aborted before its first token
                return tokens, logprobs, finish, spans
            if version == self.version and not self._updating:
                raise ServerDownError(f"{server.client.url} aborted a sample for no reason of ours")

    def _begin(self, name: str, body: dict[str, Any]) -> tuple[Server, SampleCall, int]:
        """Take a place at the server with the fewest samples, and the version of its weights."""
        with self._turn:
            self._turn.wait_for(lambda: not self._updating)
            alive = [server for server in self.servers if server.well]
            if not alive or _stream_of(name) not in self._streams:
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


def _stream_of(name: str) -> str:
    return name.split(".")[0]


def _body(prompt: list[int], tokens: list[int], seed: int | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What to ask for the rest of a sample that has these tokens."""
    return {
        **arguments,
        "max_tokens": arguments["max_tokens"] - len(tokens),
        "prompt": [*prompt, *tokens],
        "seed": None if seed is None else seed ^ len(tokens),
        "logprobs": 0,
        "repetition_penalty": 1.0,  # the server may have defaults of the model's
        "min_p": 0.0,
        "stream": True,
        "stream_interval": PIECE,
        "return_token_ids": True,
    }
