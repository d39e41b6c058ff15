"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on policy and PRM, by `peft`.

A matrix `W` becomes `W + (alpha / rank) B A`, of which only `A` and `B` are trained. Engines get the sum, computed
matrix by matrix; the model itself is never changed, and there is never a second copy of it. It leaves out quantised
bases, dropout (a token's log-prob must not differ between two passes) and adapters of other kinds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prime_lightning.models.head import Scores
from prime_lightning.models.logprobs import ScoringLM, causal_lm
from prime_lightning.models.options import Lora

MISSING = (
    "Expected `peft` to be installed for `policy_lora` or `prm_lora`, got no module `peft`.\n"
    'Install it: pip install "prime-lightning[lora]"'
)
BASE = ".base_layer"
ADAPTER = "default"  # peft's name of the only one


def with_adapters(lm: PreTrainedModel, lora: Lora | None, seed: int) -> nn.Module:
    """A causal LM with fresh adapters, whose own weights are frozen; without `lora`, the model as it is.

    Fresh adapters change nothing: `B` is zero. `A` depends on the seed alone, so all ranks have the same.

    Raises:
        ValueError: if `peft` is not installed, no module fits `target_modules`, or tied weights are among them.
    """
    if lora is None:
        return lm
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError(MISSING) from None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        use_rslora=lora.rslora,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(lm, config)
    ends = {lm.get_input_embeddings(), lm.get_output_embeddings()}
    if lm.config.get_text_config().tie_word_embeddings and any(hasattr(end, "base_layer") for end in ends):
        raise ValueError(
            f"Expected `target_modules` without the tied embeddings of {lm.name_or_path!r}, got {lora.target_modules}: "
            "an adapter on one of them would untie them, and engines tie them."
        )
    return model


def on_same_weights(adapted: Any) -> PreTrainedModel:
    """Another causal LM, without adapters, whose weights are the frozen ones below the adapters of this one.

    The parameters are the same objects: what moves one of the models to a device, moves both.

    Args:
        adapted: With adapters.
    """
    frozen = {id(parameter): parameter for parameter in adapted.parameters() if not parameter.requires_grad}
    lm: PreTrainedModel = copy.deepcopy(adapted, frozen).unload()  # type: ignore[arg-type]
    return lm


@torch.no_grad()
def merged_parameters(
    model: nn.Module, whole: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a causal LM by their Hugging Face names, adapters added, one after another; tied ones once.

    `W + (alpha / rank) B A` in the wider number format of both; without adapters, the weights themselves.

    Args:
        model: With or without adapters.
        whole: Gathers a weight that is sharded.
    """
    lm = causal_lm(model)
    layers = dict(lm.named_modules())
    for name, parameter in lm.named_parameters():
        path, _, kind = name.rpartition(".")
        if ".lora_" in name:
            continue
        weight = whole(parameter)
        if path.endswith(BASE) and kind == "weight":
            layer: Any = layers[path.removesuffix(BASE)]
            weight = sum((_delta(layer, adapter, whole) for adapter in layer.active_adapters), weight)
        yield name.replace(BASE, ""), weight


def adapter_parameters(
    model: nn.Module, whole: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """The adapters alone, by the names that they have in peft's files, one after another.

    Args:
        model: With adapters.
        whole: Gathers a weight that is sharded.
    """
    for name, parameter in causal_lm(model).named_parameters():
        if ".lora_" in name:
            yield f"base_model.model.{name.replace(f'.{ADAPTER}', '')}", whole(parameter)


def adapter_config(model: nn.Module) -> dict[str, Any] | None:
    """What peft's `adapter_config.json` says of a model's adapters, as far as engines read it; None if it has none."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if ADAPTER not in configs:
        return None
    config = configs[ADAPTER]
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "target_modules": config.target_modules if isinstance(config.target_modules, str) else [*config.target_modules],
    }


def _delta(layer: Any, adapter: str, whole: Callable[[Tensor], Tensor]) -> Tensor:
    """`(alpha / rank) B A`, computed in float32."""
    if adapter in layer.lora_A:
        a, b, turned = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.fan_in_fan_out
    else:  # of an embedding
        a, b, turned = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], True
    delta: Tensor = layer.scaling[adapter] * (whole(b).float() @ whole(a).float())
    return (delta.T if turned else delta).to(a.dtype)


class WithoutAdapters(nn.Module):
    """The model below the adapters of another, in its memory: a frozen reference that costs nothing.

    Args:
        adapted: The model with adapters; it stays where it is, and is no part of this module.
    """

    def __init__(self, adapted: ScoringLM) -> None:
        super().__init__()
        self._adapted = (adapted,)

    def forward(self, *inputs: Any) -> Scores:
        """As `ScoringLM`."""
        (adapted,) = self._adapted
        with adapted.model.disable_adapter():  # type: ignore[operator]
            return adapted(*inputs)  # type: ignore[no-any-return]
