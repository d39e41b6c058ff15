"""Replicas of the models on several devices.

`SteppingModule` runs several forward passes of several models in one training step and accumulates over micro-batches.
DistributedDataParallel around the whole module would take each of its models for unused in each backward pass of
another one, and send all gradients with every micro-batch. Here nothing is wrapped: gradients are averaged once per
optimizer step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from prime_lightning.stepping import Gradients, parameters


class PrimeDDPStrategy(Gradients, DDPStrategy):
    """A whole copy of each model on each device; `conf/strategy/ddp.yaml`.

    A module that Lightning optimizes itself, such as `SFTModule`, is wrapped in DistributedDataParallel as ever.
    Arguments are those of Lightning's `DDPStrategy`.
    """

    def configure_ddp(self) -> None:
        """Start from the weights of rank 0."""
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:
            super().configure_ddp()
        else:
            _sync_module_states(self.lightning_module)

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Average the gradient over ranks; then its norm, the same everywhere."""
        for parameter in parameters(optimizer):
            if parameter.grad is None:  # such as an expert that no token of this rank came to
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters(optimizer) if parameter.grad is not None]
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
        torch._foreach_div_(gradients, self.world_size)
        return super().gradient_norm(optimizer)
