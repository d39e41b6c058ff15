"""How a module lies over devices: DDP, FSDP2, DeepSpeed, and their checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prime_lightning import lazily

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

__getattr__ = lazily(__name__, HOMES)
