"""How every model that scores is loaded: policy, PRM, reference and critic, in all commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prime_lightning.kernels import apply_kernels
from prime_lightning.logprobs import ScoringLM, ValueLM
from prime_lightning.lora import with_adapters
from prime_lightning.options import Loading, Lora
from prime_lightning.pretrained import load_causal_lm
from prime_lightning.stepping import RoleStrategy


def load_scoring(
    name: str,
    loading: Loading,
    devices: RoleStrategy,
    *,
    lora: Lora | None = None,
    seed: int = 0,
    kind: type[ScoringLM] | type[ValueLM] = ScoringLM,
    unused: Sequence[int] = (),
) -> Any:
    """Load a model and spread it over the devices, as its strategy does with each model.

    Args:
        name: Hugging Face id or folder.
        loading: How.
        devices: Places it; a bare `RoleStrategy` leaves it whole, where it is.
        lora: Adapters to train instead of its weights.
        seed: Of fresh adapters.
        kind: `ScoringLM`, or `ValueLM` for a critic.
        unused: Ids without a token, for the distribution that was sampled from.
    """
    lm = load_causal_lm(name, dtype=loading.dtype, attention=loading.attention)
    apply_kernels(lm, loading.kernels, gathers_weights=getattr(devices, "zero_stage_3", False))
    if loading.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    adapted: Any = with_adapters(lm, lora, seed)
    return devices.place(kind(adapted, unused=unused, **loading.scoring))
