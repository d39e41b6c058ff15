"""Several optimizers, minibatches and micro-batches in one training step that Lightning counts as one.

The Lightning plumbing of a module, so that the module itself can read like the paper: optimizer steps over
token-budgeted micro-batches with one global denominator, gradients that are not finite, sums over ranks, step counting,
and what makes a resumed run equal to one that was never stopped.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from torch import Tensor, nn
from torch.optim import Optimizer

from prime_lightning.algorithms.measures import Measures
from prime_lightning.engines.host_group import of_all_ranks, reduced
from prime_lightning.models.batch import Batch
from prime_lightning.models.head import Entropy, Scores
from prime_lightning.models.options import precision_of
from prime_lightning.training.options import Update

Terms = Callable[[Batch, Tensor], Tensor]
"""`(micro-batch, its rows in the batch) -> sum of the loss terms`."""
SKIPS_IN_A_ROW = 5


class RoleStrategy:
    """What a strategy does with each model that a `Stepper` runs. This is for whole models on each device."""

    shares_weights = True
    """Whether two models may have weights in common."""

    def place(self, model: nn.Module) -> nn.Module:
        """Spread a model that was just loaded over the devices."""
        return model

    def whole(self, parameter: Tensor) -> Tensor:
        """A whole weight, or whatever else is spread as weights are; all ranks take part."""
        return parameter.detach()

    def clipped_step(self, optimizer: LightningOptimizer, limit: float) -> Tensor:
        """Clip the gradient and step; a gradient that is not finite makes no step. Returns its norm before clipping."""
        updated = parameters(optimizer.optimizer)
        norm = self.whole(nn.utils.get_total_norm([p.grad for p in updated if p.grad is not None]))
        if norm.isfinite():
            nn.utils.clip_grads_with_norm_(updated, limit, norm)
            optimizer.step()
        optimizer.zero_grad()
        return norm


def devices(trainer: pl.Trainer | None) -> RoleStrategy:
    """How a trainer's models are spread over devices."""
    strategy = trainer.strategy if trainer is not None else None
    return strategy if isinstance(strategy, RoleStrategy) else RoleStrategy()


def check_devices(trainer: pl.Trainer) -> None:
    """Refuse strategies that take all models for one, and precisions that cast what must stay float32.

    Raises:
        ValueError: on several devices under a strategy of Lightning's own, or for such a precision.
    """
    precision_of(trainer.precision)
    if trainer.world_size > 1 and not isinstance(trainer.strategy, RoleStrategy):
        raise ValueError(
            "Expected a strategy that keeps several models apart on several devices, got "
            f"{type(trainer.strategy).__name__}. Add one of conf/strategy/*.yaml, such as ddp.yaml."
        )


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """All that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Stepper:
    """Manual optimization of the models of a Lightning module, each with its own optimizer and `Update`.

    A model is known by its *role*, the name that it has as a submodule.

    Args:
        module: Whose models they are; nothing is asked of it but what every Lightning module has.
        updates: How each role is updated; passes without gradient have the micro-batches of the first one.
        shared_prompts: Whether responses to one prompt share its tokens.
        seed: Of the minibatches.
    """

    def __init__(
        self, module: pl.LightningModule, updates: Mapping[str, Update], *, shared_prompts: bool, seed: int
    ) -> None:
        module.automatic_optimization = False
        module.strict_loading = False  # checkpoints leave the frozen reference out; see `restore`
        self.module, self.updates, self.shared_prompts, self.seed = module, updates, shared_prompts, seed
        self.optimizer_of: dict[str, LightningOptimizer] = {}
        self.skipped_in_a_row: Counter[str] = Counter()
        self.measures = Measures()  # of this iteration, or of the next one where this one was logged
        self.doing = ""  # the phase that is timed now, for the progress bar

    @property
    def iteration(self) -> int:
        """How many iterations are done, which is the number of the present one."""
        return self.module.trainer.global_step

    @property
    def devices(self) -> RoleStrategy:
        """How the models are spread over devices."""
        return devices(self.module._trainer)

    @contextmanager
    def one_step(self, roles: Sequence[str]) -> Iterator[None]:
        """Make all optimizer steps inside count as one step of the trainer, and step the schedules once at its end.

        `max_steps`, checkpoints and loggers then count iterations.

        Args:
            roles: Of the optimizers, in the order of `configure_optimizers`.
        """
        optimizers = self.module.optimizers()
        listed = optimizers if isinstance(optimizers, list) else [optimizers]
        self.optimizer_of = dict(zip(roles, listed, strict=True))
        for optimizer in listed:
            optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure
        yield
        schedulers = self.module.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()  # type: ignore[call-arg]
        loop = self.module.trainer.fit_loop.epoch_loop.manual_optimization
        loop._on_before_step()
        loop._on_after_step()

    def learning_rates(self) -> dict[str, float]:
        """Of each role, as they are logged."""
        return {f"{role}/lr": one.param_groups[0]["lr"] for role, one in self.optimizer_of.items()}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to the metric `time/<phase>`."""
        start, self.doing = time.perf_counter(), phase
        yield
        self.doing = ""
        if self.module.device.type == "cuda":  # what was asked for is not done yet
            torch.cuda.synchronize(self.module.device)
        self.measures.total(f"time/{phase}", time.perf_counter() - start)

    # ---- forward passes

    def logprobs(self, role: str, batch: Batch, entropy: Entropy = "none", *, as_sampled: bool = False) -> Scores:
        """Log-probs (or values) of each response token, `[b, t]`, and their entropy where it is asked for.

        As the engine sampled, at its temperature and under its mask, or of the model's own distribution.
        """
        law = (batch.temperature, entropy, batch.masked) if as_sampled else (1.0, entropy, False)
        model = self.module.get_submodule(role)
        return model(batch.tokens_BL, batch.prompt_length_B, batch.response_length_B, *law)  # type: ignore[no-any-return]

    @torch.no_grad()
    def score(self, role: str, batch: Batch, *, as_sampled: bool = False) -> Tensor:
        """Log-probs (or values) of all response tokens, `[B, T]`, in micro-batches without gradient."""
        out_BT = torch.zeros_like(batch.behaviour_logprobs_BT)
        everything, update = torch.arange(len(batch)), next(iter(self.updates.values()))
        with self.timed("score"):
            for rows in self.level(self.microbatches(update, batch, everything)):
                if rows is None:
                    self.logprobs(role, batch.nothing())
                else:
                    scored_bt, _ = self.logprobs(role, batch.select(rows), as_sampled=as_sampled)
                    out_BT[self.placed(rows), : scored_bt.shape[1]] = scored_bt
        return out_BT

    def microbatches(self, update: Update, batch: Batch, rows: Tensor, **options: bool) -> Iterator[Tensor]:
        """Rows in parts of as many tokens as an update may have at a time."""
        return batch.microbatches(rows, update.micro_tokens, shared_prompts=self.shared_prompts, **options)

    def placed(self, rows: Tensor) -> Tensor:
        """Numbers of rows on the device; the host does not wait until they are there."""
        return rows.to(self.module.device, non_blocking=True)

    def level(self, micros: Iterable[Tensor]) -> list[Tensor | None]:
        """These micro-batches, and None for each that another rank has more: all ranks do as many forwards."""
        here = list(micros)
        most = int(self.all_reduce(torch.tensor(float(len(here))), "max"))
        return [*here, *[None] * (most - len(here))]

    # ---- updates

    def optimise(
        self,
        role: str,
        batch: Batch,
        terms: Terms,
        count: Callable[[Tensor], Tensor],
        *,
        whole_groups: bool = False,
        give_up: Callable[[str], None] | None = None,
    ) -> bool:
        """Optimizer steps over shuffled minibatches of whole groups; a step's loss is `sum of terms / global count`.

        Args:
            role: Which model.
            batch: All rollouts of the iteration.
            terms: Sum of the loss terms of a micro-batch.
            count: Number of terms of a minibatch, from its rows.
            whole_groups: Do not split groups between micro-batches.
            give_up: Called where the gradient was not finite many times in a row, instead of ending the run.

        Returns:
            Whether there was anything to learn from, on any rank.

        Raises:
            FloatingPointError: of a gradient that is not finite many times in a row, with what to look at.
        """
        learned = False
        update, generator = self.updates[role], self.generator(role)
        groups = int(self.all_reduce(torch.tensor(float(batch.groups)), "sum"))
        passes = (batch.minibatches(update.minibatches, generator, groups) for _ in range(update.epochs))
        with self.timed(role):
            for rows in itertools.chain.from_iterable(passes):
                total = self.all_reduce(count(rows).float(), "sum")
                if total == 0:  # on all ranks; weight decay and momentum alone must not move the model
                    continue
                for micro in self.level(self.microbatches(update, batch, rows, whole_groups=whole_groups)):
                    if micro is None:  # by the same computation, which sharding strategies compare over ranks
                        loss = terms(batch.nothing(), self.placed(torch.zeros(1, dtype=torch.long)))
                    else:
                        loss = terms(batch.select(micro), self.placed(micro))
                    self.module.manual_backward(loss * (self.module.trainer.world_size / total))
                self.step(role, update.grad_clip)
                if self.skipped_in_a_row[role] >= SKIPS_IN_A_ROW:
                    (give_up or self.give_up)(role)
                learned = True
        return learned

    def step(self, role: str, grad_clip: float) -> None:
        """Clip and step; a gradient that is not finite skips the step on all ranks."""
        norm = self.devices.clipped_step(self.optimizer_of[role], grad_clip)
        broken = not norm.isfinite()
        self.measures.total(f"{role}/skipped_steps", float(broken))
        self.skipped_in_a_row[role] = self.skipped_in_a_row[role] + 1 if broken else 0
        if not broken:
            self.measures.add(f"{role}/grad_norm", norm)

    def give_up(self, role: str) -> None:
        """A model that cannot learn any more ends the run."""
        raise FloatingPointError(
            f"The gradient of the {role} was not finite {SKIPS_IN_A_ROW} times in a row, at iteration "
            f"{self.iteration}. Look at {role}/grad_norm and importance/abs_diff_max of the iterations before, lower "
            f"the learning rate of the {role}, and check the weights that it starts from."
        )

    # ---- ranks

    def all_reduce(self, tensor: Tensor, how: str) -> Tensor:
        """Sum or maximum over all ranks."""
        trainer = self.module.trainer
        if trainer.world_size == 1:
            return tensor
        if tensor.device.type == "cpu":
            return reduced(tensor, how)
        return trainer.strategy.reduce(tensor.to(self.module.device, copy=True), reduce_op=how)  # it reduces in place

    def gather(self, thing: Any) -> list[Any]:
        """What each rank has, in the order of the ranks; for small things."""
        return of_all_ranks(thing) if self.module.trainer.world_size > 1 else [thing]

    def generator(self, purpose: str) -> torch.Generator:
        """A generator that depends on the seed, the iteration and the purpose, so that none has to be saved."""
        key = f"{self.seed}/{self.iteration}/{purpose}"
        return torch.Generator().manual_seed(zlib.crc32(key.encode()))

    # ---- checkpoints

    def save(self, checkpoint: dict[str, Any], state: Mapping[str, Any], of_rank: Any = None) -> None:
        """Leave the frozen reference out of a checkpoint, and put the state of all ranks in.

        Args:
            checkpoint: As Lightning made it; it is changed.
            state: What else a resumed run, and a reader of the models, needs; the same on all ranks.
            of_rank: What is another on each rank; tensors and plain values.
        """
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if not name.startswith("reference.")}
        checkpoint["prime"] = {
            **state,
            "skipped_in_a_row": dict(self.skipped_in_a_row),
            "ranks": self.gather(of_rank),
            "torch_rng": self.gather(torch.get_rng_state()),
        }
        loop = checkpoint["loops"]["fit_loop"]["state_dict"]  # has the data loader's state of one rank
        if "combined_loader" in loop:
            states = self.gather(loop["combined_loader"])
            loop["combined_loader"] = [{"ranks": list(of_ranks)} for of_ranks in zip(*states, strict=True)]

    def restore(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Refuse a checkpoint of other models; returns the `state` that was saved, what the ranks gave as `ranks`.

        Raises:
            ValueError: and which weights are not the same.
        """
        trainer = self.module.trainer
        names = trainer.strategy.lightning_module_state_dict()
        mine = {name for name in names if not name.startswith("reference.")}
        differing = sorted(mine ^ checkpoint["state_dict"].keys())
        if differing:
            raise ValueError(
                f"Expected a checkpoint of the same models, got one that differs in {len(differing)} weights "
                f"({', '.join(differing[:3])} ...). Start it with the config that wrote it."
            )
        state: dict[str, Any] = checkpoint["prime"]
        self.skipped_in_a_row = Counter(state["skipped_in_a_row"])
        if len(state["torch_rng"]) == trainer.world_size:
            torch.set_rng_state(state["torch_rng"][trainer.global_rank])
        return state
