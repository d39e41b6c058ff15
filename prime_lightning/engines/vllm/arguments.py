"""What a `VLLMEngine` asks of vLLM: engine arguments by vLLM's names, and the process's environment."""

from __future__ import annotations

from typing import Any

from prime_lightning.engines.vllm.devices import visible

CPU_ARGUMENTS = {
    "enforce_eager": True,
    "block_size": 32,  # the default of 128 would cache no short prompt
    "enable_chunked_prefill": False,  # a seeded sample of half a prompt fails: "CPU Generator does not use offset"
}
BATCHED_TOKENS = 8192  # on GPUs; vLLM's own default for an engine that is not its class `LLM` is 2048


def arguments_of(engine: Any, room: int | None, can_sleep: bool) -> dict[str, Any]:
    """Engine arguments by vLLM's names.

    Args:
        engine: A `VLLMEngine`.
        room: Greatest rank of adapters, as vLLM has it; None without.
        can_sleep: Whether it sleeps while the trainer works.
    """
    return {
        "model": engine.model,
        "dtype": engine.dtype,
        "max_num_seqs": engine.max_sequences,
        "max_model_len": engine.max_model_len,
        "tensor_parallel_size": engine.tensor_parallel,
        "kv_cache_memory_bytes": _cache_bytes(engine),
        "logprobs_mode": "processed_logprobs",  # the default leaves temperature and top-p out
        "generation_config": "vllm",  # not the model's own sampling numbers
        "weight_transfer_config": {"backend": "prime_host" if engine.transfer == "host" else engine.transfer},
        "worker_extension_cls": "prime_lightning.engines.vllm.worker.VLLMWorker",
        **(_cuda_arguments(engine, can_sleep) if engine.cuda else CPU_ARGUMENTS),
        **({"enable_lora": True, "max_loras": 1, "max_lora_rank": room} if room else {}),
        **engine.args,
    }


def _cache_bytes(engine: Any) -> int | None:
    """Memory for keys and values; None leaves it to `gpu_memory_utilization`.

    An engine in the place of a dead one takes what the first one had, for a trainer's memory would spoil the
    measurement by which vLLM finds it.
    """
    gib = engine.kv_cache_gib if engine.kv_cache_gib is not None or engine.cuda else 0.25
    return engine.first_cache_bytes if gib is None else int(gib * 2**30)


def _cuda_arguments(engine: Any, can_sleep: bool) -> dict[str, Any]:
    tokens = engine.max_batched_tokens or max(BATCHED_TOKENS, engine.max_sequences)
    return {
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "enable_sleep_mode": can_sleep,
        "max_num_batched_tokens": tokens,
    }


def environment_of(engine: Any, devices: list[int]) -> dict[str, str]:
    """Environment of the engine's process, besides what it inherits.

    Args:
        engine: A `VLLMEngine`.
        devices: Its CUDA devices, as this process numbers them; unused on a CPU.
    """
    if engine.cuda:
        return {"CUDA_VISIBLE_DEVICES": visible(devices), **engine.env}
    cores = "|".join(map(str, range(engine.tensor_parallel)))
    return {
        "TORCHDYNAMO_DISABLE": "1",  # else the first log-probs wait half a minute for a compiler
        "OMP_NUM_THREADS": str(engine.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if engine.tensor_parallel == 1 else cores,
        "MALLOC_ARENA_MAX": "1",  # memory stays flat over thousands of weight updates
        **engine.env,
    }
