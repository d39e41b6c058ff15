"""What a strategy that treats the models of a module one by one does to the module.

Lightning's own strategies do these things to a module as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from prime_lightning.training.stepping import parameters


def models_of(module: nn.Module) -> dict[str, nn.Module]:
    """The direct children of a module that have parameters, by name."""
    return {role: model for role, model in module.named_children() if any(True for _ in model.parameters())}


def owners_of(module: nn.Module, optimizers: list[Optimizer]) -> list[str]:
    """The direct child of a module that owns all parameters of each optimizer.

    Raises:
        ValueError: if there is none, or one is owned twice.
    """
    of_parameter = {id(p): role for role, model in module.named_children() for p in model.parameters()}
    owners = [{of_parameter.get(id(p)) for p in parameters(optimizer)} for optimizer in optimizers]
    named = [role for found in owners for role in found if len(found) == 1 and role is not None]
    if len(set(named)) != len(optimizers):
        raise ValueError(
            f"Expected each optimizer to have the parameters of one model, got {owners}. DeepSpeed makes an engine of "
            "each pair of a model and an optimizer."
        )
    return named


def copies_of(replicas: int | Literal["nodes"], nodes: int, ranks: int) -> int:
    """How many whole copies of a model there are.

    Raises:
        ValueError: if ranks cannot be dealt out to them evenly.

    Example:
        >>> copies_of("nodes", nodes=2, ranks=16)
        2
    """
    copies = nodes if replicas == "nodes" else replicas
    if not isinstance(copies, int) or copies < 1 or ranks % copies:
        raise ValueError(
            f"Expected the strategy's `replicas` to be `nodes` or to divide the number of ranks, got {replicas!r} and "
            f"{ranks} ranks."
        )
    return copies


def settle(module: LightningModule, device: torch.device) -> None:
    """Tell a module that its models are on a device, and move there what is no model, such as metrics.

    Moving the module itself would move all models at once, in float32 and before they are sharded.
    """
    module._device = device
    models = models_of(module)
    for name, child in module.named_children():
        if name not in models:
            child.to(device)


def replace_parameters(model: nn.Module, chosen: Callable[[nn.Parameter], bool], whole: Callable[..., Tensor]) -> None:
    """Put fresh parameters in the place of chosen ones; tied ones stay tied.

    Args:
        model: Changed in place.
        chosen: Which parameters.
        whole: The value of the fresh one, from the old one.
    """
    fresh: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and chosen(parameter):
                if id(parameter) not in fresh:
                    fresh[id(parameter)] = nn.Parameter(whole(parameter), parameter.requires_grad)
                part._parameters[name] = fresh[id(parameter)]


def restore_buffers(model: nn.Module | None) -> None:
    """Undo what casting a model to bfloat16 does to the frequencies of its rotary embeddings (DeepSpeed issue 4932)."""
    for module in model.modules() if model is not None else ():
        if any(name.endswith("inv_freq") for name in module._buffers) and hasattr(module, "config"):
            for name, buffer in type(module)(config=module.config).named_buffers(recurse=False):
                old = module._buffers[name]
                assert old is not None
                module._buffers[name] = buffer.to(old.device)
