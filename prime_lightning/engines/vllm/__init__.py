"""vLLM in a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prime_lightning import lazily

if TYPE_CHECKING:
    from prime_lightning.engines.vllm.engine import VLLMEngine
    from prime_lightning.engines.vllm.shared import SharedVLLMEngine

__all__ = ["SharedVLLMEngine", "VLLMEngine"]
HOMES = {
    "VLLMEngine": "engine",
    "SharedVLLMEngine": "shared",
}
"""Files of the names that users write; each is imported when it is first asked for."""

__getattr__ = lazily(__name__, HOMES)
