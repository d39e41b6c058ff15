"""Doctests are collected from all files; those that need an optional package only where it is installed."""

import importlib.util

NEEDED = {
    "prime_lightning/engines/vllm/child.py": "vllm",
    "prime_lightning/engines/vllm/worker.py": "vllm",
    "prime_lightning/engines/weights/cuda.py": "vllm",
    "tests/verifiers/fuzz_texts.py": "atheris",
}
collect_ignore = [path for path, package in NEEDED.items() if importlib.util.find_spec(package) is None]
