"""Sampling with vLLM in a process of its own, on CPU or GPU.

A crash of the engine is never the trainer's: it is started again with the weights it had, and unfinished samples are
drawn once more from the same seeds. One rank has one engine; `vllm_shared.py` lets several use one. `vllm_process.py`
holds the process, in which `vllm_child.py` runs; nothing here imports vLLM, and on CPU the trainer never does.

It leaves out speculative decoding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from prime_lightning.engines import Kept
from prime_lightning.engines.samples import check_fits, completion_of, end_token_ids
from prime_lightning.engines.vllm_adapters import Adapters, room_for
from prime_lightning.engines.vllm_devices import check_devices, own_gpu, transfer_of, visible
from prime_lightning.engines.vllm_errors import MISSING, explain
from prime_lightning.engines.vllm_process import Channel, EngineDiedError, EngineProcess, ProcessClient
from prime_lightning.engines.weight_transfer import HostSender, WeightCopy
from prime_lightning.engines.work import Work, sampling_arguments
from prime_lightning.pretrained import load_tokenizer
from prime_lightning.rollout import Completion, Prompt, Sampling

CPU_ARGUMENTS = {
    "enforce_eager": True,
    "block_size": 32,  # the default of 128 would cache no short prompt
    "enable_chunked_prefill": False,  # a seeded sample of half a prompt fails: "CPU Generator does not use offset"
}


class VLLMEngine:
    """An `Engine` on vLLM.

    Args:
        device: `cpu`, `cuda`, or `auto` for CUDA where torch sees it.
        dtype: Of the engine's weights; the trainer's are converted on their way.
        max_sequences: Samples computed at the same time.
        max_model_len: Longest prompt and completion in tokens; None is the model's own limit.
        kv_cache_gib: Memory for keys and values; None is 0.25 on CPU, and `gpu_memory_utilization` decides on GPUs.
        gpu_memory_utilization: Share of the GPU for weights, keys and values; 0.3 to 0.5 beside a trainer.
        tensor_parallel: GPUs (on CPU: processes) that share the model; on GPUs it needs `devices`.
        devices: CUDA devices of the engine's own, as the trainer numbers them; None is the trainer's current one.
        transfer: How weights come: `host` (shared memory), `ipc` (same GPU), `nccl` (other GPUs); `auto` picks one.
        seeded: Fix each sample by seed, draw and number; without it sampling is faster and does not repeat.
        threads: Of the engine on CPU; docs/vllm.md says when more than one helps.
        start_timeout: Seconds until the model must be loaded.
        stall_timeout: Seconds without a sign of life after which a busy engine counts as dead.
        restarts: Deaths that a run survives.
        lora_rank: Compute with a LoRA policy's adapters, of this rank at most, beside the weights that the engine reads
            from disk; None gets them merged.
        sleep_level: What an engine on the trainer's GPU does while the trainer works: stay as it is (0), keep its
            weights in host memory (1), or drop them (2), since it gets new ones.
        args: Further engine arguments by vLLM's names; they win.
        env: Further environment variables of the engine's process; they win.
    """

    def __init__(
        self,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: str = "float32",
        max_sequences: int = 256,
        max_model_len: int | None = None,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.4,
        tensor_parallel: int = 1,
        devices: list[int] | None = None,
        transfer: Literal["auto", "host", "ipc", "nccl"] = "auto",
        seeded: bool = True,
        threads: int = 1,
        start_timeout: float = 600.0,
        stall_timeout: float = 300.0,
        restarts: int = 3,
        lora_rank: int | None = None,
        sleep_level: Literal[0, 1, 2] = 2,
        args: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.version = -1
        self.dtype, self.max_sequences, self.max_model_len = dtype, max_sequences, max_model_len
        self.kv_cache_gib, self.gpu_memory_utilization = kv_cache_gib, gpu_memory_utilization
        self.tensor_parallel, self.devices, self.seeded, self.threads = tensor_parallel, devices, seeded, threads
        self.start_timeout, self.stall_timeout, self.restarts = start_timeout, stall_timeout, restarts
        self.lora_rank = lora_rank
        self.sleep_level = sleep_level if lora_rank is None else min(sleep_level, 1)  # nobody would send the weights
        self.args, self.env = args or {}, env or {}
        self.cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self._check_tensor_parallel()
        self.transfer = transfer_of(transfer, self.cuda, devices)
        self._can_sleep = self.cuda and devices is None and sleep_level > 0
        self._room = None if lora_rank is None else room_for(lora_rank)
        if lora_rank is not None and tensor_parallel > 1:
            raise ValueError(
                f"Expected `lora_rank` null with `tensor_parallel` {tensor_parallel}, got {lora_rank}: adapters of an "
                "engine in parts cannot be compared after a sync, merged weights can."
            )
        if lora_rank is not None and self.args.get("load_format") == "dummy":
            raise ValueError(
                "Expected an engine with `lora_rank` to read its weights from disk, got `load_format: dummy`: only "
                "adapters are sent to it."
            )
        self.adapters: Adapters | None = None
        self.process: EngineProcess | None = None
        self.deaths = 0
        self._sender: tuple[EngineProcess, Any] | None = None
        self._asleep = self._hollow = False  # hollow: without weights that one could sample with
        self._lock = threading.RLock()  # one sync, restart or sleep at a time
        self._streams, self._prefix = itertools.count(), "s"

    def _check_tensor_parallel(self) -> None:
        """Refuse a model in more parts than there are GPUs for them."""
        if self.cuda and self.tensor_parallel > 1 and len(self.devices or ()) != self.tensor_parallel:
            raise ValueError(
                f"Expected `devices` with {self.tensor_parallel} GPUs of the engine's own for tensor_parallel "
                f"{self.tensor_parallel}, got {self.devices}. To share the GPUs of as many ranks, take "
                "engines.vllm_shared.SharedVLLMEngine."
            )

    # ---- the Engine protocol

    def start(self, model: str) -> None:
        """Begin to load. On CPU the first use waits for the end of it, so that the trainer loads its own meanwhile.

        Raises:
            ValueError: if vLLM is not installed, there is no such model, or (on GPUs) it does not fit.
        """
        self.close()
        self._prepare(model)
        self.copy = WeightCopy(model, self.dtype)
        self.deaths, self.process = 0, self._spawn()
        if self.cuda:
            self.ready()  # vLLM measures the GPU's free memory, which must stand still for that

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send all weights, one after another, and compare a sample of them with what the engine then has.

        Raises:
            ValueError: if a name or a shape does not fit, or one is missing.
            RuntimeError: if the engine does not have what was sent.
        """
        with self._lock:
            process = self.ready()
            passing = self.copy.passing(weights, version)
            try:
                self._sender_of(process).send(passing)
            except EngineDiedError as death:
                for _ in passing:
                    pass  # the copy must be whole, for the process that follows
                self.revive(process, death)
            self.version, self._hollow = version, False

    def load_adapters(self, config: Mapping[str, Any], adapters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send adapters in place of weights, and compare a sample of them with what the engine then has.

        Raises:
            ValueError: if their rank is greater than `lora_rank`.
            RuntimeError: if the engine does not take them, or does not have what was sent.
        """
        if self._room is None or config["r"] > self._room:
            raise ValueError(f"Expected adapters of rank {self.lora_rank} at most (`lora_rank`), got {config['r']}.")
        with self._lock:
            process = self.ready()
            self.adapters = Adapters.taken(config, adapters, version, self.copy.dtype)
            try:
                self._send_adapters(process, self.adapters)
            except EngineDiedError as death:
                self.revive(process, death)
            self.version = version

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, kept: Kept | None = None
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Yield each group as soon as its last sample is finished; closing it aborts the others."""
        process = self.channel()
        check_fits(prompts, sampling, process.info["max_model_len"])
        if self._asleep or self._hollow:
            raise ValueError("Expected an engine with weights, got one that sleeps or has none yet: `wake` or sync it.")
        work = Work(f"{self._prefix}{next(self._streams)}", prompts, sampling, self.seeded, kept=kept)
        try:
            process.open(work.name)
            while work.unfinished:
                try:
                    check_fits(work.grow(), sampling, process.info["max_model_len"])
                    self._feed(process, work)
                    yield from self._take(process, work)
                except EngineDiedError as death:
                    work.give_back()
                    process = self.channel(process, death)
                    process.open(work.name)
        finally:
            process.close_stream(work.name)
            if work.flying:
                with contextlib.suppress(EngineDiedError):  # then nothing flies any more
                    process.send("abort", list(work.flying))

    def sleep(self) -> None:
        """Give up memory of the trainer's GPU, with the weights; on CPU, and on GPUs of its own, nothing happens."""
        with self._lock:
            if self._can_sleep and not self._asleep:
                self._call("sleep", level=self.sleep_level)
                self._asleep = True
                if self.sleep_level == 2:
                    self.version, self._hollow = -1, True

    def wake(self) -> None:
        """Take GPU memory back; after sleep level 2 the weights must be sent again."""
        with self._lock:
            if self._asleep:
                torch.cuda.empty_cache()  # what the trainer's allocator holds for later
                self._asleep = False
                self._call("wake")

    def _call(self, method: str, **arguments: Any) -> None:
        """Call the process, or the one in its place if it died meanwhile."""
        process = self.ready()
        try:
            process.call(method, self.stall_timeout, **arguments)
        except EngineDiedError as death:
            self.revive(process, death)  # awake, with the last weights
            if method == "sleep":
                self.ready().call(method, self.stall_timeout, **arguments)

    def close(self) -> None:
        """End the process and give all memory back."""
        with self._lock:
            if self.process is not None:
                self.process.close()
                self.copy.close()
            self.adapters = None
            self.process, self._sender, self._asleep, self.version = None, None, False, -1

    # ---- samples

    def _feed(self, process: Channel, work: Work) -> None:
        """Keep twice as many samples in flight as are computed at a time: the engine never waits for the trainer."""
        requests = work.take(2 * self.max_sequences)
        if requests:
            plain = [(request.name, list(work.prompts[request.prompt].token_ids), request.seed) for request in requests]
            process.send("add", plain, sampling_arguments(work.sampling, self.end_ids))

    def _take(self, process: Channel, work: Work) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Wait for a finished sample; yield its group if it was the last."""
        kind, name, *rest = process.next(work.name, self.stall_timeout)
        if kind == "rejected":
            raise ValueError(f"vLLM does not take a prompt: {rest[0]}")
        token_ids, logprobs, finish, spans = rest
        versions = [version for text, start, end in spans for version in [_version(text)] * (end - start)]
        yield from work.finish(name, completion_of(self.tokenizer, token_ids, logprobs, finish, versions))

    # ---- the process

    def ready(self) -> EngineProcess:
        """The process, once its model is loaded.

        Raises:
            ValueError: if it could not start.
        """
        if self.process is None:
            raise RuntimeError("Expected a started engine, got none: call `start` with a model first.")
        try:
            self.process.wait_ready(self.start_timeout)
        except EngineDiedError as death:
            raise ValueError(explain(str(death))) from None
        return self.process

    def channel(self, died: Channel | None = None, death: EngineDiedError | None = None) -> Channel:
        """What draws samples: the process, or the one in the place of one that died."""
        return self.ready() if died is None or death is None else self.revive(died, death)

    def _prepare(self, model: str) -> None:
        """What every rank does that samples."""
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(MISSING)
        if self.cuda:
            check_devices(self._devices())
        self.model, self.tokenizer = model, load_tokenizer(model)
        self.end_ids = end_token_ids(self.tokenizer, _generation_end(model))
        self._hollow = self.args.get("load_format") == "dummy"

    def _spawn(self) -> EngineProcess:
        return EngineProcess(self._arguments(), self._environment())

    def revive(self, died: Channel, death: EngineDiedError) -> EngineProcess:
        """The process in a dead one's place, with the last weights; whoever needs it first starts it.

        Raises:
            EngineDiedError: if it died too often, or the last weights are not known.
        """
        with self._lock:
            if self.process is not died and self.process is not None:
                return self.process
            self.deaths += 1
            version = self.copy.version if self.adapters is None else self.adapters.version
            if self.process is None or self.deaths > self.restarts or (self.version >= 0 and version is None):
                raise death
            warnings.warn(
                f"{death}\nIt is started again with the weights of version {version} (death {self.deaths} of "
                f"{self.restarts} that a run survives); its unfinished samples are drawn again.",
                stacklevel=2,
            )
            self.process.close(0)
            self.process, self._asleep = self._spawn(), False
            self.process.wait_ready(self.start_timeout)
            if self.adapters is not None:
                self._send_adapters(self.process, self.adapters)
            elif self.copy.version is not None:
                self._sender_of(self.process).resend()
                self._hollow = False
            return self.process

    def _send_adapters(self, process: EngineProcess, adapters: Adapters) -> None:
        """Hand them over in a folder of the process, and compare what it has then."""
        folder, columns = process.folder / "adapters", adapters.columns()
        adapters.write(folder)
        process.call("load_adapters", self.stall_timeout, folder=str(folder), weight_version=str(adapters.version))
        adapters.compare(columns, process.call("read_adapters", self.stall_timeout, columns=columns))

    def _sender_of(self, process: EngineProcess) -> Any:
        """The weight transfer to this process, which has shaken hands."""
        if self._sender is None or self._sender[0] is not process:
            client = ProcessClient(process, self.stall_timeout)
            if self.transfer == "host":
                sender: Any = HostSender(client, self.copy)
            else:
                from prime_lightning.engines.weight_transfer_cuda import sender_of  # imports vLLM into the trainer

                workers = process.info["world_size"]
                sender = sender_of(self.transfer, client, self.copy, workers, devices=self._devices())
            self._sender = process, sender
        return self._sender[1]

    def _arguments(self) -> dict[str, Any]:
        """Engine arguments by vLLM's names."""
        gib = self.kv_cache_gib if self.kv_cache_gib is not None or self.cuda else 0.25
        return {
            "model": self.model,
            "dtype": self.dtype,
            "max_num_seqs": self.max_sequences,
            "max_model_len": self.max_model_len,
            "tensor_parallel_size": self.tensor_parallel,
            "kv_cache_memory_bytes": None if gib is None else int(gib * 2**30),
            "logprobs_mode": "processed_logprobs",  # the default leaves temperature and top-p out
            "generation_config": "vllm",  # not the model's own sampling numbers
            "weight_transfer_config": {"backend": "prime_host" if self.transfer == "host" else self.transfer},
            "worker_extension_cls": "prime_lightning.engines.vllm_worker.VLLMWorker",
            **(
                {
                    "gpu_memory_utilization": self.gpu_memory_utilization,
                    "enable_sleep_mode": self._can_sleep,
                }
                if self.cuda
                else CPU_ARGUMENTS
            ),
            **({"enable_lora": True, "max_loras": 1, "max_lora_rank": self._room} if self._room else {}),
            **self.args,
        }

    def _devices(self) -> list[int]:
        """CUDA devices of the engine."""
        return [own_gpu()] if self.devices is None else self.devices

    def _environment(self) -> dict[str, str]:
        """Environment of the engine's process, besides what it inherits."""
        if self.cuda:
            return {"CUDA_VISIBLE_DEVICES": visible(self._devices()), **self.env}
        cores = "|".join(map(str, range(self.tensor_parallel)))
        return {
            "TORCHDYNAMO_DISABLE": "1",  # else the first log-probs wait half a minute for a compiler
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind" if self.tensor_parallel == 1 else cores,
            "MALLOC_ARENA_MAX": "1",  # memory stays flat over thousands of weight updates
            **self.env,
        }


def _generation_end(model: str) -> int | list[int] | None:
    """End tokens of the model's generation config, or of its config where it has none."""
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id  # type: ignore[no-any-return]
    except OSError:
        return getattr(AutoConfig.from_pretrained(model), "eos_token_id", None)


def _version(text: str) -> int:
    """The engine's label of its weights as a number; -1 for those it loaded by itself."""
    return int(text) if text.isdigit() else -1
