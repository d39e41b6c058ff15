"""Doctests are collected from all files; those that need an optional package only where it is installed."""

import importlib.util

NEEDED = {
    "prime_lightning/engines/vllm_child.py": "vllm",
    "prime_lightning/engines/vllm_worker.py": "vllm",
    "prime_lightning/engines/weight_transfer_cuda.py": "vllm",
    "tests/verifiers/fuzz_texts.py": "atheris",
}
collect_ignore = [path for path, package in NEEDED.items() if importlib.util.find_spec(package) is None]
