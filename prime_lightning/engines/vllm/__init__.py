"""vLLM in a process of its own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prime_lightning.engines.vllm.engine import VLLMEngine
    from prime_lightning.engines.vllm.shared import SharedVLLMEngine

__all__ = ["SharedVLLMEngine", "VLLMEngine"]
HOMES = {
    "VLLMEngine": "engine",
    "SharedVLLMEngine": "shared",
}
"""Files of the names that users write; each is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
