"""vLLM servers of several machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prime_lightning import lazily

if TYPE_CHECKING:
    from prime_lightning.engines.server.engine import ServerEngine

__all__ = ["ServerEngine"]
HOMES = {
    "ServerEngine": "engine",
}
"""Files of the names that users write; each is imported when it is first asked for."""

__getattr__ = lazily(__name__, HOMES)
