"""What it means when vLLM does not start, and what to do: two lines instead of its traceback."""

from __future__ import annotations

INSTEAD = "or sample in the trainer's process: add --config conf/engine/hf.yaml."

MISSING = (
    "Expected vLLM to be installed for engines.vllm.VLLMEngine, got no module `vllm`.\n"
    'Install it as docs/vllm.md says (with CUDA: pip install "prime-lightning[vllm]"), ' + INSTEAD
)

KV_CACHE = "Raise the engine's `kv_cache_gib` (on GPUs `gpu_memory_utilization`), or lower `max_model_len`."

TOO_MUCH = "Lower the engine's `kv_cache_gib`, take a smaller model or a machine with more memory, "
HINTS = (  # what vLLM prints, what to do; the first that fits
    ("nms does not exist", f"torchvision does not fit this torch: remove it as docs/vllm.md says, {INSTEAD}"),
    ("ImportError", f"The vLLM installation is broken: install it again as docs/vllm.md says, {INSTEAD}"),
    ("ModuleNotFoundError", f"The vLLM installation is broken: install it again as docs/vllm.md says, {INSTEAD}"),
    (
        "CPU attention configuration",
        f"vLLM on CPU wants attention heads of 32, 64, 80, 96, 112, 128 or more numbers: take another model, {INSTEAD}",
    ),
    ("derived max_model_len", "Lower the engine's `max_model_len` to what the model can do, or leave it out."),
    ("killed from outside", TOO_MUCH + INSTEAD),
    ("Available memory on node", TOO_MUCH + INSTEAD),
    ("allocate memory", TOO_MUCH + INSTEAD),
    ("cache blocks", KV_CACHE),
    ("KV cache", KV_CACHE),
    (
        "memory utilization",
        "Do two engines, or engine and trainer, share this GPU? Give each rank its own, or lower "
        "`gpu_memory_utilization`.",
    ),
    ("out of memory", "Lower `gpu_memory_utilization` or `max_sequences`, or raise `tensor_parallel`."),
)


FINAL = (  # what another start would say again
    *("nms does not exist", "ImportError", "ModuleNotFoundError", "CPU attention configuration", "max_model_len"),
    *("cache blocks", "KV cache", "ValidationError", "not supported", "Available memory on node"),
)


def may_pass(why: str) -> bool:
    """Whether another start may go better, as where a port or memory was taken.

    Example:
        >>> may_pass("OSError: Address already in use"), may_pass("ModuleNotFoundError: No module named 'triton'")
        (True, False)
    """
    return not any(sign in why for sign in FINAL)


def explain(why: str) -> str:
    """The cause of a failed start, in vLLM's own words, and what to do about it.

    Args:
        why: Traceback or log.
    """
    sign, hint = next(((sign, what) for sign, what in HINTS if sign in why), ("", ""))
    if not hint:
        return why
    cause = [line.strip() for line in why.splitlines() if sign in line][-1]
    return f"The vLLM engine did not start: {cause}\n{hint}"
