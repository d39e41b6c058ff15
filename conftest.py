"""Doctests are collected from the package; files that need vLLM at their top only where it is installed."""

import importlib.util

NEED_VLLM = ("vllm_child", "vllm_worker", "weight_transfer_cuda")
collect_ignore = [f"prime_lightning/engines/{name}.py" for name in NEED_VLLM if not importlib.util.find_spec("vllm")]
