"""How every model that scores is loaded: policy, PRM, reference and critic, in all commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prime_lightning.models.kernels import apply_kernels
from prime_lightning.models.logprobs import ScoringLM, ValueLM
from prime_lightning.models.lora import on_same_weights, with_adapters
from prime_lightning.models.options import Loading, Lora
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.training.stepping import RoleStrategy


def load_scoring(
    name: str,
    loading: Loading,
    devices: RoleStrategy,
    *,
    lora: Lora | None = None,
    seed: int = 0,
    kind: type[ScoringLM] | type[ValueLM] = ScoringLM,
    unused: Sequence[int] = (),
    beside: ScoringLM | None = None,
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
        beside: A model of this name with adapters, whose frozen weights this one has, too; nothing is loaded then.

    Raises:
        ValueError: if a strategy that spreads weights over devices is to share them between models.
    """
    if beside is not None and not devices.shares_weights:
        raise ValueError(
            f"Expected a strategy that keeps whole models with `share_base: true`, got {type(devices).__name__}, which "
            "spreads the weights of each. Take conf/strategy/ddp.yaml or one_gpu.yaml, or leave `share_base` out."
        )
    if beside is None:
        lm = load_causal_lm(name, dtype=loading.dtype, attention=loading.attention)
    else:
        lm = on_same_weights(beside.model)
    if beside is None or loading.kernels == "compile":  # a copy has the others already
        apply_kernels(lm, loading.kernels, gathers_weights=getattr(devices, "zero_stage_3", False))
    if loading.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    adapted: Any = with_adapters(lm, lora, seed)
    return devices.place(kind(adapted, unused=unused, **loading.scoring))
