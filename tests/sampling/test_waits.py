"""The host waits for no device within a loop over micro-batches.

The device is torch's `meta`: it computes shapes, and whoever asks it for a number gets an error. Which rows go together
is decided on the host, once a minibatch, from group numbers that are asked for then.
"""

from types import SimpleNamespace

import pytest
import tiny
import torch
from toys import rollout

from prime_lightning import algorithms as alg
from prime_lightning.algorithms.measures import Measures
from prime_lightning.models.batch import Batch
from prime_lightning.models.options import Loading
from prime_lightning.training.learning import optimise_prm
from prime_lightning.training.options import PolicyLoss, Update

META = torch.device("meta")


def batch():
    """Three groups of two responses, of 1 to 7 tokens."""
    lengths = [(1, 7), (3, 3), (5, 2)]
    groups = [[rollout(i, [5] * (i + 2), [3] * n, float(n > 2)) for n in pair] for i, pair in enumerate(lengths)]
    return Batch.of_groups(groups)


@pytest.fixture
def prime(model_folder, monkeypatch):
    """A module on the device that nobody may ask, and the batch there."""
    here = batch()
    monkeypatch.setattr(Batch, "minibatches", lambda *_: [torch.arange(len(here))])
    monkeypatch.setattr(Batch, "groups", 3)

    def made(**options):
        update = Update(minibatches=1, micro_tokens=12)
        made = tiny.module(model_folder, policy_update=update, prm_update=update, **options)
        made._trainer = SimpleNamespace(world_size=1, global_step=0, strategy=None)
        made.configure_model()
        monkeypatch.setattr(type(made), "device", META)
        made.policy.to(META), made.prm.to(META)
        stepper = made.stepper
        stepper.microbatches = lambda update, there, rows, **_: here.microbatches(rows, 12)
        made.manual_backward = lambda loss: made.counted.append(loss.backward())
        stepper.step = lambda *_: None
        stepper.all_reduce = lambda tensor, how: torch.ones(tensor.shape) if tensor.is_meta else tensor
        made.counted = []
        return made, here.to(META)

    return made


@pytest.mark.parametrize("packed", [False, True])
def test_scores_and_updates_ask_the_device_for_nothing(prime, packed, monkeypatch):
    if not packed:  # transformers reads one number a forward to find out whether rows are packed
        monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    loading = Loading(packed=packed, attention="varlen" if packed else "sdpa", shared_prompts="off")
    module, there = prime(loading=loading, policy_loss=PolicyLoss(entropy_weight=0.1))
    scored_BT = module.stepper.score("policy", there)
    assert scored_BT.shape == there.mask_BT.shape
    for proximal_BT in (scored_BT, None):
        module.policy_learner.update(there, scored_BT, proximal_BT, scored_BT)
    optimise_prm(module.stepper, there, scored_BT, alg.ce, 0.05)
    assert len(module.counted) > 9
    assert module.measures._sums["policy/loss"].is_meta


def test_numbers_of_a_device_are_read_once(monkeypatch):
    measures, read = Measures(), []
    for _ in range(5):
        measures.add("a", torch.tensor(2.0, device=META), torch.tensor(1, device=META))
        measures.add("b", 3.0)
        measures.add_all({"c_max": torch.tensor(1.0, device=META)}, torch.tensor(1, device=META))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: read.append(x.device.type) or torch.ones(x.shape).double())
    assert measures.means() == {"a": 1.0, "b": 1.0, "c_max": 1.0}
    assert sorted(read) == ["cpu", "meta"]
