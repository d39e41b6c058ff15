"""Several optimizers, minibatches and micro-batches in one training step that Lightning counts as one.

The Lightning plumbing below `PrimeModule`, so that the module itself can read like the paper: optimizer steps over
token-budgeted micro-batches with one global denominator, gradients that are not finite, sums over ranks, step counting,
and the state that makes a resumed run equal to one that was never stopped.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from torch import Tensor, nn
from torch.optim import Optimizer

from prime_lightning import algorithms as alg
from prime_lightning.algorithms.measures import Measures
from prime_lightning.engines.host_group import of_all_ranks, reduced
from prime_lightning.models.batch import Batch
from prime_lightning.models.head import Entropy, Scores
from prime_lightning.models.options import Loading, precision_of
from prime_lightning.training.options import Update
from prime_lightning.training.run_metadata import run_facts

Terms = Callable[[Batch, Tensor], Tensor]
"""`(micro-batch, its rows in the batch) -> sum of the loss terms`."""
SKIPS_IN_A_ROW = 5


class RoleStrategy:
    """What a strategy does with each model of a `SteppingModule`. This is for whole models on each device."""

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


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """All that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class SteppingModule(pl.LightningModule):
    """Manual optimization of named models ("roles"), each with its own optimizer and `Update`."""

    trained: list[str]
    """Roles that have an optimizer, in the order of `configure_optimizers`."""
    updates: dict[str, Update]
    """How each role is updated."""
    loading: Loading
    """How the models are run."""
    command = ""
    """What started the run, for the cards of its models."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints leave the frozen reference out; see `load_state_dict`
        self.seed = seed
        self.skipped_in_a_row: Counter[str] = Counter()
        self.measures, self.between = Measures(), Measures()
        self.doing = ""  # the phase that is timed now, for the progress bar

    @property
    def devices(self) -> RoleStrategy:
        """How the models are spread over devices."""
        return devices(self._trainer)

    def setup(self, stage: str) -> None:
        """Refuse strategies that take all models for one, and precisions that cast what must stay float32.

        Raises:
            ValueError: on several devices under a strategy of Lightning's own, or for such a precision.
        """
        precision_of(self.trainer.precision)
        if self.trainer.world_size > 1 and not isinstance(self.trainer.strategy, RoleStrategy):
            raise ValueError(
                "Expected a strategy that keeps several models apart on several devices, got "
                f"{type(self.trainer.strategy).__name__}. Add one of conf/strategy/*.yaml, such as ddp.yaml."
            )

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Make all optimizer steps inside count as one step of the trainer, and step the schedules once at its end.

        `max_steps`, checkpoints and loggers then count iterations.
        """
        self.measures, self.between = self.between, Measures()
        optimizers = self.optimizers()
        listed = optimizers if isinstance(optimizers, list) else [optimizers]
        self.optimizer_of: dict[str, LightningOptimizer] = dict(zip(self.trained, listed, strict=True))
        for optimizer in listed:
            optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure
        yield
        schedulers = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()  # type: ignore[call-arg]
        loop = self.trainer.fit_loop.epoch_loop.manual_optimization
        loop._on_before_step()
        loop._on_after_step()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to the metric `time/<phase>`."""
        start, self.doing = time.perf_counter(), phase
        yield
        self.doing = ""
        if self.device.type == "cuda":  # what was asked for is not done yet
            torch.cuda.synchronize(self.device)
        self.measures.total(f"time/{phase}", time.perf_counter() - start)

    @contextmanager
    def timed_between(self, phase: str) -> Iterator[None]:
        """The same for work between two iterations; it counts to the next one."""
        start = time.perf_counter()
        yield
        self.between.total(f"time/{phase}", time.perf_counter() - start)

    def on_validation_start(self) -> None:
        """Start the clock of `time/evaluation`."""
        self._evaluating = time.perf_counter()

    def on_validation_epoch_end(self) -> None:
        """Log it beside what the evaluation found."""
        self.log("time/evaluation", time.perf_counter() - self._evaluating, reduce_fx="max", sync_dist=True)

    def logprobs(
        self, model: nn.Module | None, batch: Batch, entropy: Entropy = "none", *, as_sampled: bool = False
    ) -> Scores:
        """Log-probs (or values) of each response token, `[b, t]`, and their entropy where it is asked for.

        As the engine sampled, at its temperature and under its mask, or of the model's own distribution.
        """
        assert model is not None
        law = (batch.temperature, entropy, batch.masked) if as_sampled else (1.0, entropy, False)
        return model(batch.tokens_BL, batch.prompt_length_B, batch.response_length_B, *law)  # type: ignore

    @torch.no_grad()
    def score(self, model: nn.Module | None, batch: Batch, *, as_sampled: bool = False) -> Tensor:
        """Log-probs (or values) of all response tokens, `[B, T]`, in micro-batches without gradient."""
        out_BT = torch.zeros_like(batch.behaviour_logprobs_BT)
        everything = torch.arange(len(batch))
        with self.timed("score"):
            for rows in self.level(self.microbatches("policy", batch, everything)):
                if rows is None:
                    self.logprobs(model, batch.nothing())
                else:
                    scored_bt, _ = self.logprobs(model, batch.select(rows), as_sampled=as_sampled)
                    out_BT[self.placed(rows), : scored_bt.shape[1]] = scored_bt
        return out_BT

    def microbatches(self, role: str, batch: Batch, rows: Tensor, *, whole_groups: bool = False) -> Iterator[Tensor]:
        """Rows in parts of as many tokens as a role may have at a time."""
        budget, shared = self.updates[role].micro_tokens, self.loading.shares_prompts
        return batch.microbatches(rows, budget, whole_groups=whole_groups, shared_prompts=shared)

    def placed(self, rows: Tensor) -> Tensor:
        """Numbers of rows on the device; the host does not wait until they are there."""
        return rows.to(self.device, non_blocking=True)

    def level(self, micros: Iterable[Tensor]) -> list[Tensor | None]:
        """These micro-batches, and None for each that another rank has more: all ranks do as many forwards."""
        here = list(micros)
        most = int(self.all_reduce(torch.tensor(float(len(here))), "max"))
        return [*here, *[None] * (most - len(here))]

    def optimise(
        self, role: str, batch: Batch, terms: Terms, count: Callable[[Tensor], Tensor], *, whole_groups: bool = False
    ) -> bool:
        """Optimizer steps over shuffled minibatches of whole groups; a step's loss is `sum of terms / global count`.

        Args:
            role: Which model.
            batch: All rollouts of the iteration.
            terms: Sum of the loss terms of a micro-batch.
            count: Number of terms of a minibatch, from its rows.
            whole_groups: Do not split groups between micro-batches.

        Returns:
            Whether there was anything to learn from, on any rank.
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
                for micro in self.level(self.microbatches(role, batch, rows, whole_groups=whole_groups)):
                    if micro is None:  # by the same computation, which sharding strategies compare over ranks
                        loss = terms(batch.nothing(), self.placed(torch.zeros(1, dtype=torch.long)))
                    else:
                        loss = terms(batch.select(micro), self.placed(micro))
                    self.manual_backward(loss * (self.trainer.world_size / total))
                self.step(role, update.grad_clip)
                learned = True
        return learned

    def optimise_prm(
        self,
        batch: Batch,
        reference_BT: Tensor,
        loss: Callable[..., Any],
        beta: float,
        intercept_B: Tensor | None = None,
    ) -> Tensor | None:
        """Train `self.prm` on the outcomes: `loss` of `r = beta * sum_t log(prm / reference)`, PRIME's Eq. 3.

        Args:
            batch: Responses with outcomes.
            reference_BT: `log pi_ref` of their tokens.
            loss: See `algorithms.prm_loss`.
            beta: Reward per nat.
            intercept_B: Added to `r`, see `algorithms.BaseRate`.

        Returns:
            Its log-probs `[B, T]` under the mask as they were before; None unless one step over all responses was all.
        """
        labels = batch.outcome_B, batch.group_B, batch.valid_B
        seen_BT = torch.zeros_like(batch.behaviour_logprobs_BT)

        def terms(micro: Batch, rows: Tensor) -> Tensor:
            prm_bt, _ = self.logprobs(self.prm, micro)  # type: ignore[arg-type]
            t = prm_bt.shape[1]
            seen_BT[rows, :t] = torch.where(micro.mask_BT, prm_bt.detach(), seen_BT[rows, :t])  # no row that only pads
            reference_bt = reference_BT[rows, :t]
            reward_bt = alg.process_reward(prm_bt, reference_bt, micro.mask_BT, beta=beta)
            logit_b = reward_bt.sum(1) if intercept_B is None else reward_bt.sum(1) + intercept_B[rows]
            total, count = loss(logit_b, micro.outcome_B, micro.group_B, micro.valid_B)
            self.measures.add("prm/loss", total, count)
            return total  # type: ignore[no-any-return]

        def count(rows: Tensor) -> Tensor:
            return loss(torch.zeros(len(rows), device=self.device), *(x[rows] for x in labels))[1]  # type: ignore

        learned = self.optimise("prm", batch, terms, count, whole_groups=getattr(loss, "whole_groups", True))
        return seen_BT if learned and self.updates["prm"].one_step else None

    def step(self, role: str, grad_clip: float) -> None:
        """Clip and step; a gradient that is not finite skips the step on all ranks, and many in a row end the run."""
        norm = self.devices.clipped_step(self.optimizer_of[role], grad_clip)
        broken = not norm.isfinite()
        self.measures.total(f"{role}/skipped_steps", float(broken))
        self.skipped_in_a_row[role] = self.skipped_in_a_row[role] + 1 if broken else 0
        if not broken:
            self.measures.add(f"{role}/grad_norm", norm)
        if self.skipped_in_a_row[role] >= SKIPS_IN_A_ROW:
            self.give_up(role)

    def give_up(self, role: str) -> None:
        """A model that cannot learn any more ends the run.

        Raises:
            FloatingPointError: with what to look at.
        """
        raise FloatingPointError(
            f"The gradient of the {role} was not finite {SKIPS_IN_A_ROW} times in a row, at iteration "
            f"{self.trainer.global_step}. Look at {role}/grad_norm and importance/abs_diff_max of the iterations "
            f"before, lower the learning rate of the {role}, and check the weights that it starts from."
        )

    def all_reduce(self, tensor: Tensor, how: str) -> Tensor:
        """Sum or maximum over all ranks."""
        if self.trainer.world_size == 1:
            return tensor
        if tensor.device.type == "cpu":
            return reduced(tensor, how)
        return self.trainer.strategy.reduce(tensor.to(self.device, copy=True), reduce_op=how)  # it reduces in place

    def gather(self, thing: Any) -> list[Any]:
        """What each rank has, in the order of the ranks; for small things."""
        return of_all_ranks(thing) if self.trainer.world_size > 1 else [thing]

    def generator(self, purpose: str) -> torch.Generator:
        """A generator that depends on the seed, the iteration and the purpose, so that none has to be saved."""
        key = f"{self.seed}/{self.trainer.global_step}/{purpose}"
        return torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def extra_state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights, optimizers and schedules; the same on all ranks."""
        return {}

    def rank_state(self) -> Any:
        """What it needs that is another on each rank; tensors and plain values."""
        return None

    def load_extra_state(self, state: dict[str, Any], of_ranks: list[Any]) -> None:
        """Take up what `extra_state` gave, and `rank_state` on each rank of the run that was saved."""

    def facts(self) -> dict[str, Any]:
        """What a reader of the trained models has to know: `names` of the models they start from, and options."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen reference out, and put the state of all ranks in."""
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if not name.startswith("reference.")}
        checkpoint["prime"] = {
            **self.extra_state(),
            "skipped_in_a_row": dict(self.skipped_in_a_row),
            "facts": run_facts(self),
            "ranks": self.gather(self.rank_state()),
            "torch_rng": self.gather(torch.get_rng_state()),
        }
        loop = checkpoint["loops"]["fit_loop"]["state_dict"]  # has the data loader's state of one rank
        if "combined_loader" in loop:
            states = self.gather(loop["combined_loader"])
            loop["combined_loader"] = [{"ranks": list(of_ranks)} for of_ranks in zip(*states, strict=True)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other models, then take up the extra state."""
        names = self.trainer.strategy.lightning_module_state_dict()
        mine = {name for name in names if not name.startswith("reference.")}
        differing = sorted(mine ^ checkpoint["state_dict"].keys())
        if differing:
            raise ValueError(
                f"Expected a checkpoint of the same models, got one that differs in {len(differing)} weights "
                f"({', '.join(differing[:3])} ...). Start it with the config that wrote it."
            )
        state = checkpoint["prime"]
        self.skipped_in_a_row = Counter(state["skipped_in_a_row"])
        if len(state["torch_rng"]) == self.trainer.world_size:
            torch.set_rng_state(state["torch_rng"][self.global_rank])
        self.load_extra_state(state, state["ranks"])
