"""vLLM servers of several machines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prime_lightning.engines.server.engine import ServerEngine

__all__ = ["ServerEngine"]
HOMES = {
    "ServerEngine": "engine",
}
"""Files of the names that users write; each is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
