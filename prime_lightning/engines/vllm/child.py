"""The process in which vLLM runs: `python -m prime_lightning.engines.vllm.child FD`, started by `vllm/process.py`.

One synchronous `LLMEngine`, stepped here and driven by messages over a socket pair whose other end the trainer holds.
It ends when the trainer says so, closes the socket, or is gone: a watchdog looks for that even while vLLM computes.
PR_SET_PDEATHSIG would not do instead, since it fires when the thread that started this process ends.

Messages in: `add`, `abort`, `call`, `stop`. Messages out: `ready` or `fatal` once, then `done`, `rejected`, `beat`
(still computing) and `ret`. All are tuples that begin with these words.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from prime_lightning.engines.vllm import group as vllm_group
from prime_lightning.engines.vllm.worker import ADAPTER
from prime_lightning.engines.weights.transfer import joined

BEAT = 1.0  # seconds between signs of life while nothing finishes


def main(fd: int) -> int:
    """Load vLLM, then serve until the trainer stops or is gone."""
    os.set_inheritable(fd, False)
    threading.Thread(target=watch, args=(fd, os.getppid()), daemon=True).start()
    connection = Connection(fd)
    arguments = connection.recv()
    try:
        engine = LLMEngine.from_engine_args(EngineArgs(disable_log_stats=True, **arguments))
        warm_up(engine)
    except BaseException:
        connection.send(("fatal", traceback.format_exc()))
        return 1
    config = engine.vllm_config
    info = {
        "max_model_len": config.model_config.max_model_len,
        "cache_bytes": cache_bytes(engine),
        "world_size": config.parallel_config.world_size,
        "shared_memory": vllm_group.shared_memory(os.getpgrp()),
    }
    connection.send(("ready", info))
    try:
        return Server(connection, engine).run()
    finally:
        engine.engine_core.shutdown()


def cache_bytes(engine: LLMEngine) -> int:
    """Memory of each worker for keys and values."""
    cache = engine.engine_core.engine_core.scheduler.kv_cache_config  # the core is in this process
    return sum(tensor.size for tensor in cache.kv_cache_tensors)


def warm_up(engine: LLMEngine) -> None:
    """Generate one token, so that what this model cannot do here shows now."""
    params = SamplingParams(max_tokens=1, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    engine.add_request("warm-up", {"prompt_token_ids": [0]}, params)
    while engine.has_unfinished_requests():
        engine.step()
    engine.reset_prefix_cache()


def watch(fd: int, parent: int) -> None:
    """Kill this process and its children once the trainer is gone, whatever they do at that moment."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    while os.getppid() == parent and not poll.poll(500):
        pass
    for _ in range(100):  # a trainer that lives and closed the socket is ending us in order, and has some seconds
        if os.getppid() != parent:
            shutil.rmtree(os.environ["PRIME_LIGHTNING_ENGINE_FOLDER"], ignore_errors=True)
            break
        time.sleep(0.05)
    vllm_group.end(os.getpgrp())
    os.kill(os.getpid(), signal.SIGKILL)


class Server:
    """Steps the engine and answers messages between steps."""

    def __init__(self, connection: Connection, engine: LLMEngine) -> None:
        self.connection, self.engine = connection, engine
        self.heard = time.monotonic()
        self.adapters: LoRARequest | None = None
        self.updating = False  # between the start and the end of a weight update there is no model to step

    def run(self) -> int:
        """Serve until told to stop, or the trainer is gone."""
        while True:
            while self.connection.poll(0 if self.engine.has_unfinished_requests() and not self.updating else None):
                try:
                    kind, *rest = self.connection.recv()
                except (EOFError, OSError):
                    return 0
                if kind == "stop":
                    return 0
                getattr(self, f"on_{kind}")(*rest)
            self.report([output for output in self.engine.step() if output.finished])

    def report(self, outputs: list[RequestOutput]) -> None:
        """Send what a step finished, or now and then a sign of life."""
        now = time.monotonic()
        if outputs:
            self.connection.send(("done", [finished(output) for output in outputs]))
        elif now - self.heard > BEAT:
            self.connection.send(("beat",))
        else:
            return
        self.heard = now

    def on_add(self, requests: list[tuple[str, list[int], int | None]], sampling: dict[str, Any]) -> None:
        """Queue samples: (id, prompt tokens, seed) each."""
        for name, token_ids, seed in requests:
            params = SamplingParams(
                **sampling,
                seed=seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize="stop" in sampling,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            try:
                self.engine.add_request(name, {"prompt_token_ids": token_ids}, params, lora_request=self.adapters)
            except ValueError as error:
                self.connection.send(("rejected", name, str(error)))

    def on_abort(self, names: list[str]) -> None:
        """Drop samples; those that are finished already are unknown to the engine, which is fine."""
        self.engine.abort_request(names)

    def on_call(self, number: int, method: str, arguments: dict[str, Any]) -> None:
        """Run a method between two steps and answer with its result or its traceback."""
        try:
            answer = (True, getattr(self, f"do_{method}")(**arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        self.connection.send(("ret", number, *answer))

    def do_init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Shake hands with the trainer's side of the weight transfer."""
        self.engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def do_start_weight_update(self) -> None:
        """Make the model ready to take weights."""
        self.updating = True
        self.engine.collective_rpc("start_weight_update")

    def do_update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one piece."""
        self.engine.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def do_finish_weight_update(self, weight_version: str) -> None:
        """Take the weights into use; samples in flight go on with them, their caches computed again."""
        self.engine.collective_rpc("finish_weight_update")
        self.updating = False
        self._begin_version(weight_version)

    def do_load_adapters(self, folder: str, weight_version: str) -> None:
        """Take adapters from a folder into use, in place of those before."""
        self.engine.add_lora(LoRARequest("policy", ADAPTER, folder, load_inplace=True))
        self.adapters = LoRARequest("policy", ADAPTER, folder)  # not in place: else each step would read them again
        self._begin_version(weight_version)

    def do_read_adapters(self, columns: dict[str, int]) -> dict[str, list[float]]:
        """Values of the adapters that the model computes with, from the first worker."""
        read: list[dict[str, list[float]]] = self.engine.collective_rpc(
            "prime_read_adapters", kwargs={"columns": columns}
        )
        return read[0]

    def _begin_version(self, weight_version: str) -> None:
        self.engine.set_weight_version(weight_version)
        if not self.engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not reset its prefix cache, which holds keys and values of the old weights.")

    def do_read_back(self, columns: dict[str, int]) -> dict[str, list[float]]:
        """Values of the model's own weights."""
        return joined(self.engine.collective_rpc("prime_read_back", kwargs={"columns": columns}))

    def do_sleep(self, level: int) -> None:
        """Give up device memory."""
        self.engine.reset_prefix_cache()
        self.engine.sleep(level)

    def do_wake(self, tags: list[str] | None = None) -> None:
        """Take device memory back; with tags (`weights`, `kv_cache`) a part of it."""
        self.engine.wake_up(tags)

    def do_unfinished(self) -> int:
        """Samples that are queued or computed."""
        return self.engine.get_num_unfinished_requests()


def finished(output: RequestOutput) -> tuple[str, list[int], list[float], str | None, list[tuple[str, int, int]]]:
    """A finished sample as plain data: id, tokens, log-probs, reason, spans of weight versions."""
    sample = output.outputs[0]
    token_ids, logprobs = list(sample.token_ids), sample.logprobs
    starts = logprobs.start_indices[: len(token_ids)]  # the sampled token is the first candidate of its position
    assert [logprobs.token_ids[start] for start in starts] == token_ids
    spans = [(span.version, span.start, span.end) for span in sample.weight_versions or ()]
    return output.request_id, token_ids, [logprobs.logprobs[start] for start in starts], sample.finish_reason, spans


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
