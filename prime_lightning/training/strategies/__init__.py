"""How a module lies over devices: DDP, FSDP2, DeepSpeed, and their checkpoints."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prime_lightning.training.strategies.ddp_fsdp import PrimeDDPStrategy, PrimeFSDPStrategy
    from prime_lightning.training.strategies.deepspeed import PrimeDeepSpeedStrategy

__all__ = ["PrimeDDPStrategy", "PrimeDeepSpeedStrategy", "PrimeFSDPStrategy"]
HOMES = {
    "PrimeDDPStrategy": "ddp_fsdp",
    "PrimeFSDPStrategy": "ddp_fsdp",
    "PrimeDeepSpeedStrategy": "deepspeed",
}
"""Files of the names that users write; each is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
