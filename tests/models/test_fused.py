"""Fused AdamW: equal steps, and a resumed one counts its steps where its kernel reads them."""

import pytest
import torch

from prime_lightning.training.strategies.ddp_fsdp import PrimeFSDPStrategy


@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_fused_optimizer_counts_steps_on_the_device(fused):
    """The device `meta` stands for a GPU."""
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.param_groups[0]["fused"] = fused
    saved = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    PrimeFSDPStrategy().put_state(optimizer, {"state": {0: saved}})
    state = optimizer.state[weight]
    assert state["step"].device.type == ("meta" if fused else "cpu")
    assert state["exp_avg"].device.type == "meta"
    assert state["step"] is not saved["step"]


def test_fused_steps_are_those_of_the_plain_optimizer():
    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, generator=generator))
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, fused=fused)
        for _ in range(5):
            weight.grad = torch.randn(64, generator=generator)
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
