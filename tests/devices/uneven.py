"""Ranks of very different work: rank 0 has responses of 30 tokens, rank 1 of one or two; the head's chunks are of two.

A scene `uneven:KIND:MODELS:STRATEGY` trains for two steps: KIND is `prime`, `step` (the same with one optimizer step an
iteration), `sft` or `prm`. MODELS is `untied`, `tied` or `adapted` (LoRA on the head, too), and behind it may come
`-again` (gradient checkpointing), `-wide` (head in float32) or `-mixed` (that, and the rest in bfloat16). Every
process counts its collectives and the calls of each head.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import ranks
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from toys import rollout

from prime_lightning import algorithms as alg
from prime_lightning.models.batch import Batch
from prime_lightning.models.head import OpenHead
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.models.options import Loading, Lora
from prime_lightning.prm.train import PRMModule
from prime_lightning.rollout import Verdict
from prime_lightning.training.options import PolicyLoss, ProcessReward, Replaying, Update

LENGTHS = ((30, 24), (1, 2), (29, 30), (2, 1))  # of the two responses to each of four prompts
STEPS = 2


class Collectives(TorchDispatchMode):
    """How often this process calls each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Given(pl.LightningDataModule):
    """Batches that are made here, for all kinds of training.

    Args:
        kind: Of training.
    """

    batch_size = 1

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.lessons = kind, STEPS * [[SimpleNamespace(label=0.0), SimpleNamespace(label=1.0)]]

    def sync(self, weights: Any, version: int) -> None:
        """Nothing is sampled."""

    def hand_on_rejected(self, most: float) -> None:
        """Rejected groups come with every batch."""

    def rest(self) -> None:
        """Nothing runs."""

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [self.batch(torch.Generator().manual_seed(step), rank, world, step) for step in range(STEPS)]
        return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)

    def batch(self, generator: torch.Generator, rank: int, world: int, version: int) -> Any:
        def tokens(count: int) -> list[int]:
            return torch.randint(4, 16, (count,), generator=generator).tolist()

        groups = [
            [
                rollout(i, prompt, tokens(length), score=float(j == i % 2), version=version)
                for j, length in enumerate(lengths)
            ]
            for i, (lengths, prompt) in enumerate((lengths, tokens(3)) for lengths in LENGTHS)
        ]
        batch = Batch.of_groups(groups[rank::world], rank=rank, world=world)
        if self.kind == "prime":  # rejected groups are of the first rank alone, which has two groups more than accepted
            wrong = [[replace(r, verdict=Verdict.of_score(0.0)) for r in group] for group in groups[1:3]]
            rejected = Batch.of_groups(wrong) if rank == 0 else batch.nothing()
            batch = replace(batch, rejected=rejected)
        return (batch.tokens_BL, batch.prompt_length_B, batch.response_length_B) if self.kind == "sft" else batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Weights move by the gradient; at twice the rate one process with sums in another order gets 2e-5 elsewhere."""
    return torch.optim.SGD(parameters, lr=0.05)


def module(folder: Path, kind: str, models: str) -> Any:
    """A module of that kind; its own model is `models`, the other one, where there is one, the opposite."""
    kept, _, way = models.partition("-")
    own, other = (str(folder / name) for name in (("tied", "untied") if kept == "tied" else ("untied", "tied")))
    dtype = "float32" if way in ("wide", "mixed") else None
    loading = Loading(chunk_tokens=2, gradient_checkpointing=way == "again", head_dtype=dtype)
    update = Update(minibatches=1 if kind == "step" else 2, micro_tokens=80, grad_clip=10.0)
    if kind == "sft":
        return tiny.SFTModule(own, loading, sgd, warmup=0.0)
    if kind == "prm":
        return PRMModule(own, other, loading, beta=0.5, update=update, optimizer=sgd, warmup=0.0)
    replay = Replaying(iterations=2, passes=2, draw="groups")
    reward = ProcessReward(
        beta=0.5, learn_from="all", intercept="base_rate", replay=replay, process_only="all_wrong"
    )  # the gate is open in the second iteration
    loss = PolicyLoss(entropy_weight=0.01)
    lora = Lora(rank=2, target_modules=["lm_head", "q_proj"]) if kept == "adapted" else None
    prime = tiny.module(
        own, prm=other, reference=own, loading=loading, process_reward=reward, policy_loss=loss, policy_lora=lora,
        gate=alg.ProcessGate(max_ce=None, min_accuracy=0.0),
        policy_update=update, prm_update=update, policy_optimizer=sgd, prm_optimizer=sgd,
    )  # fmt: skip
    prime.passes.engine_checked = True  # nothing sampled these responses
    return prime


def watch(role: str, model: Any, seen: Counter[str]) -> None:
    """Count a model's forwards, the calls of its head, and the gathers of the head's weight under ZeRO-3."""
    for part in model.modules():
        if isinstance(part, ScoringLM):
            part.register_forward_hook(lambda *_: seen.update([f"{role} forwards"]))
        if isinstance(part, OpenHead):
            part.register_forward_hook(lambda *_: seen.update([f"{role} heads"]))
            weight = part.weight
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            parameter.all_gather_coalesced = counted(parameter.all_gather_coalesced, weight, f"{role} gathers", seen)


def counted(gather: Any, weight: torch.Tensor, name: str, seen: Counter[str]) -> Any:
    """DeepSpeed's gathering of some parameters, counted where the weight is among them."""

    def gathering(parameters: Any = None, *args: Any, **options: Any) -> Any:
        seen[name] += sum(p is weight for p in parameters or ())
        return gather(parameters, *args, **options)

    return gathering


class Counting(pl.Callback):
    """Counts over the whole of `fit`."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.heads, self.collectives = Counter(), Collectives()
        for role in ("policy", "prm", "reference"):
            if getattr(module, role, None) is not None:
                watch(role, getattr(module, role), self.heads)
        self.collectives.__enter__()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.collectives.__exit__(None, None, None)


def train(folder: Path, scene: str) -> None:
    """`uneven:KIND:MODELS:STRATEGY`."""
    _, kind, models, name = scene.split(":")
    spread, history, counting = ranks.strategy(name), tiny.History(), Counting()
    if name == "zero3":
        spread.config["zero_optimization"]["stage3_max_reuse_distance"] = 0  # all that is used is gathered
    learner, data = module(folder, kind, models), Given(kind)
    world = 1 if name == "one" else 2
    trainer = tiny.trainer(
        folder, STEPS, history=history, devices=world, strategy=spread, callbacks=[counting],
        enable_checkpointing=False, precision="bf16-mixed" if models.endswith("mixed") else "32-true",
    )  # fmt: skip
    trainer.fit(learner, data)
    counts = [dict(counting.collectives.calls), dict(counting.heads)]
    told = [counts] * world
    if world > 1:
        torch.distributed.all_gather_object(told, counts)
    found = {"rows": history.rows, "weights": ranks.weights(learner), "collectives": [c for c, _ in told]}
    if trainer.is_global_zero:
        torch.save(found | {"heads": [h for _, h in told]}, folder / f"{scene}.pt")
