"""Sampling with vLLM in a process of its own, on CPU or GPU.

A crash of the engine is never the trainer's: it is started again with the weights it had, and unfinished samples are
drawn once more from the same seeds. One rank has one engine; `vllm/shared.py` lets several use one. `vllm/process.py`
holds the process, in which `vllm/child.py` runs; nothing here imports vLLM, and on CPU the trainer never does.
It leaves out speculative decoding.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from prime_lightning.engines import FinishedSamples
from prime_lightning.engines.number_format import dtype_of, warn_of_float32
from prime_lightning.engines.samples import Channel, EngineDiedError, StreamingEngine
from prime_lightning.engines.vllm.adapters import Adapters, room_for
from prime_lightning.engines.vllm.arguments import arguments_of, environment_of
from prime_lightning.engines.vllm.devices import check_devices, own_gpu, transfer_of
from prime_lightning.engines.vllm.errors import MISSING, explain, may_pass
from prime_lightning.engines.vllm.process import EngineProcess
from prime_lightning.engines.weights.transfer import HostSender, WeightCopy
from prime_lightning.rollout import Completion, Prompt, Sampling


class VLLMEngine(StreamingEngine):
    """An `Engine` on vLLM.

    Args:
        device: `cpu`, `cuda`, or `auto` for CUDA where torch sees it.
        dtype: Of the engine's weights; the trainer's are converted. `auto` is bfloat16 on GPUs, float32 on CPU.
        max_sequences: Samples computed at the same time.
        max_batched_tokens: Tokens of one step on GPUs, prompts and samples together; None is 8192.
        max_model_len: Longest prompt and completion in tokens; None is the model's own limit.
        kv_cache_gib: Memory for keys and values; None is 0.25 on CPU, and `gpu_memory_utilization` decides on GPUs.
        gpu_memory_utilization: Share of the GPU for weights, keys and values; 0.3 to 0.5 beside a trainer.
        tensor_parallel: GPUs (on CPU: processes) that share the model; on GPUs it needs `devices`.
        devices: CUDA devices of the engine's own, as the trainer numbers them; None is the trainer's current one.
        transfer: How weights come: `host` (shared memory), `ipc` (same GPU), `nccl` (other GPUs); `auto` picks one.
        seeded: Fix each sample by seed, draw and number; without it nothing repeats, and a CPU samples faster.
        threads: Of the engine on CPU; docs/vllm.md says when more than one helps.
        start_timeout: Seconds until the model must be loaded.
        stall_timeout: Seconds without a sign of life after which a busy engine counts as dead.
        restarts: Deaths that a run survives, failed starts included.
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
        dtype: str = "auto",
        max_sequences: int = 256,
        max_batched_tokens: int | None = None,
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
        super().__init__(seeded)
        self.cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        self.dtype, self.max_model_len = dtype_of(dtype, self.cuda), max_model_len
        self.max_sequences, self.max_batched_tokens = max_sequences, max_batched_tokens
        self.kv_cache_gib, self.gpu_memory_utilization = kv_cache_gib, gpu_memory_utilization
        self.tensor_parallel, self.devices, self.threads = tensor_parallel, devices, threads
        self.start_timeout, self.stall_timeout, self.restarts = start_timeout, stall_timeout, restarts
        self.lora_rank = lora_rank
        self.sleep_level = sleep_level if lora_rank is None else min(sleep_level, 1)  # nobody would send the weights
        self.args, self.env = args or {}, env or {}
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
        self.first_cache_bytes: int | None = None
        self._sender: tuple[EngineProcess, Any] | None = None
        self._asleep = self._no_weights = False  # no weights that one could sample with
        self._cacheless = False  # awake, but for keys and values
        self._lock = threading.RLock()  # one sync, restart or sleep at a time

    def _check_tensor_parallel(self) -> None:
        """Refuse a model in more parts than there are GPUs for them."""
        if self.cuda and self.tensor_parallel > 1 and len(self.devices or ()) != self.tensor_parallel:
            raise ValueError(
                f"Expected `devices` with {self.tensor_parallel} GPUs of the engine's own for tensor_parallel "
                f"{self.tensor_parallel}, got {self.devices}. To share the GPUs of as many ranks, take "
                "prime_lightning.engines.vllm.SharedVLLMEngine."
            )

    # ---- the Engine protocol

    @property
    def context(self) -> int | None:
        """Longest prompt and completion in tokens; it waits until the model is loaded, and is None before `start`."""
        return None if self.process is None else self.channel().context

    def start(self, model: str) -> None:
        """Begin to load. On CPU the first use waits for the end of it, so that the trainer loads its own meanwhile.

        Raises:
            ValueError: if vLLM is not installed, there is no such model, or (on GPUs) it does not fit.
        """
        self.close()
        self._prepare(model)
        self.copy = WeightCopy(model, self.dtype)
        warn_of_float32(self.dtype, self.cuda, self.copy.parameters)
        self.deaths, self.first_cache_bytes, self.process = 0, None, self._spawn()
        if self.cuda:
            self.ready()  # vLLM measures the GPU's free memory, which must stand still for that

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send all weights, one after another, and compare a sample of them with what the engine then has.

        Raises:
            ValueError: if a name or a shape does not fit, or one is missing.
            RuntimeError: if the engine does not have what was sent.
        """
        self._load(weights, version)
        self._wake_cache()

    def _load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        with self._lock:
            process = self.ready()
            passing = self.copy.passing(weights, version)
            try:
                self._sender_of(process).send(passing)
            except EngineDiedError as death:
                for _ in passing:
                    pass  # the copy must be whole, for the process that follows
                self.revive(process, death)
            self.version, self._no_weights = version, False

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
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: FinishedSamples | None = None
    ) -> Iterator[tuple[Prompt, list[Completion]]]:
        """Yield each group as soon as its last sample is finished; closing it aborts the others."""
        if self._asleep or self._no_weights:
            raise ValueError("Expected an engine with weights, got one that sleeps or has none yet: `wake` or sync it.")
        yield from super().stream(prompts, sampling, finished)

    def sleep(self) -> None:
        """Give up memory of the trainer's GPU, with the weights; on CPU, and on GPUs of its own, nothing happens."""
        with self._lock:
            if self._can_sleep and not self._asleep:
                self._call("sleep", level=self.sleep_level)
                self._asleep = True
                if self.sleep_level == 2:
                    self.version, self._no_weights = -1, True

    def wake(self) -> None:
        """Take GPU memory back; after sleep level 2 that of weights, which must be sent, and then the rest."""
        with self._lock:
            if self._asleep:
                torch.cuda.empty_cache()  # what the trainer's allocator holds for later
                self._asleep, self._cacheless = False, self._no_weights
                self._call("wake", tags=["weights"] if self._no_weights else None)

    def _wake_cache(self) -> None:
        """Take memory for keys and values back, now that the weights are there and nothing of their way is left."""
        with self._lock:
            if self._cacheless:
                torch.cuda.empty_cache()
                self._cacheless = False
                self._call("wake", tags=["kv_cache"])

    def _call(self, method: str, **arguments: Any) -> None:
        """Call the process, or the one in its place if it died meanwhile."""
        process = self.ready()
        try:
            process.call(method, **arguments)
        except EngineDiedError as death:
            self.revive(process, death)  # wide awake, with the last weights
            if method == "sleep":
                self.ready().call(method, **arguments)

    def close(self) -> None:
        """End the process and give all memory back."""
        with self._lock:
            if self.process is not None:
                self.process.close()
                self.copy.close()
            self.adapters = None
            self.process, self._sender, self._asleep, self.version = None, None, False, -1
            self._cacheless = False

    # ---- the process

    def ready(self) -> EngineProcess:
        """The process, once its model is loaded.

        Raises:
            ValueError: if it could not start.
        """
        if self.process is None:
            raise RuntimeError("Expected a started engine, got none: call `start` with a model first.")
        process = self.process
        try:
            process.wait_ready(self.start_timeout)
        except EngineDiedError as death:
            with self._lock:
                process = self._start_again(process, death)
        if self.first_cache_bytes is None:
            self.first_cache_bytes = process.info.get("cache_bytes")
        return process

    def _start_again(self, failed: EngineProcess, death: EngineDiedError) -> EngineProcess:
        """A process in the place of one that did not start, where that may help; a failed start counts as a death."""
        if self.process is not None and self.process is not failed:
            return self.ready()
        failures = [explain(str(death))]
        while self.deaths < self.restarts and may_pass(str(death)):
            self.deaths += 1
            warnings.warn(f"{death}\nIt is started again (death {self.deaths} of {self.restarts}).", stacklevel=2)
            failed.close(0)
            self.process = failed = self._spawn()
            try:
                failed.wait_ready(self.start_timeout)
                return failed
            except EngineDiedError as again:
                death = again
                failures.append(explain(str(death)))
        raise ValueError("\nThe next start: ".join(dict.fromkeys(failures)))

    def channel(self, died: Channel | None = None, death: EngineDiedError | None = None) -> Channel:
        """The process, or the one in the place of one that died."""
        return self.ready() if died is None or death is None else self.revive(died, death)

    def _prepare(self, model: str) -> None:
        """What every rank does that samples."""
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(MISSING)
        if self.cuda:
            check_devices(self._devices())
        self.model = model
        self.read_tokenizer(model)
        self._no_weights = self.args.get("load_format") == "dummy"

    def _spawn(self) -> EngineProcess:
        if self.cuda:
            torch.cuda.empty_cache()  # an engine that starts beside a trainer gets what that only holds for later
        arguments = arguments_of(self, self._room, self._can_sleep)
        return EngineProcess(arguments, environment_of(self, self._devices() if self.cuda else []), self.stall_timeout)

    def revive(self, died: Channel, death: EngineDiedError) -> EngineProcess:
        """The process in a dead one's place, with the last weights; whoever needs it first starts it.

        Raises:
            EngineDiedError: if it died too often, or the last weights are not known.
            ValueError: if it does not start any more.
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
            self.process, self._asleep, self._cacheless = self._spawn(), False, False
            self.process = self.ready()
            if self.adapters is not None:
                self._send_adapters(self.process, self.adapters)
            elif self.copy.version is not None:
                self._sender_of(self.process).resend()
                self._no_weights = False
            return self.process

    def _send_adapters(self, process: EngineProcess, adapters: Adapters) -> None:
        """Hand them over in a folder of the process, and compare what it has then."""
        folder, columns = process.folder / "adapters", adapters.columns()
        adapters.write(folder)
        process.call("load_adapters", folder=str(folder), weight_version=str(adapters.version))
        adapters.compare(columns, process.call("read_adapters", columns=columns))

    def _sender_of(self, process: EngineProcess) -> Any:
        """The weight transfer to this process, which has shaken hands."""
        if self._sender is None or self._sender[0] is not process:
            if self.transfer == "host":
                sender: Any = HostSender(process, self.copy)
            else:
                from prime_lightning.engines.weights.cuda import sender_of  # imports vLLM into the trainer

                workers = process.info["world_size"]
                sender = sender_of(self.transfer, process, self.copy, workers, devices=self._devices())
            self._sender = process, sender
        return self._sender[1]

    def _devices(self) -> list[int]:
        """CUDA devices of the engine."""
        return [own_gpu()] if self.devices is None else self.devices
