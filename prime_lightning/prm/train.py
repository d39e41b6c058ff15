"""Offline training of an implicit PRM on labelled responses (arXiv 2412.01981): `prime-lightning prm`.

The same loss, update and reward as the online PRM's, over a file instead of fresh rollouts. The folder that it writes
can be the `model.prm` that a PRIME run starts from.

Shapes: B responses, T response tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric
from transformers import PreTrainedTokenizerBase

from prime_lightning import algorithms as alg
from prime_lightning.models.batch import Batch
from prime_lightning.models.options import Loading
from prime_lightning.models.pretrained import check_same_vocabulary, load_tokenizer
from prime_lightning.prm.responses import grouped, read_rollouts, tokenized, without_empty
from prime_lightning.prompts.dataset import permutation
from prime_lightning.rollout import Group, Rollout
from prime_lightning.training.learning import optimise_prm
from prime_lightning.training.options import Update
from prime_lightning.training.run_metadata import import_path, run_metadata
from prime_lightning.training.scoring import load_scoring
from prime_lightning.training.sft import LessonLoader, cosine
from prime_lightning.training.stepping import Stepper, check_devices

VALIDATION_LAP = 2**31  # a pass of the seeded order that training never comes to


class LabelledDataModule(pl.LightningDataModule):
    """Feeds labelled responses, those of one prompt always together.

    Args:
        model: Hugging Face id or folder of the PRM, for the tokenizer.
        path: Rows with `prompt`, `response` and `label`, or the `rollouts.jsonl` of a run; a file or a hub id.
        validation_path: The same to validate on; null takes a share of the prompts of `path`.
        validation_share: That share.
        prompts_per_batch: Prompts of one optimizer step, with all their responses, over all ranks.
        max_tokens: Longer responses (with their prompt) are left out and counted.
        extra_columns: Ignore columns that are not known, instead of refusing the file.
        drop_empty: Leave empty responses out, instead of refusing the file.
        seed: Of the order, and of the share that is validated on.

    Raises:
        ValueError: for a file that cannot be meant, or too few prompts.
    """

    def __init__(
        self,
        model: str,
        path: str,
        validation_path: str | None = None,
        validation_share: float = 0.05,
        prompts_per_batch: int = 64,
        max_tokens: int = 4096,
        extra_columns: bool = False,
        drop_empty: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if not 0 <= validation_share < 1:
            raise ValueError(f"Expected `data.validation_share` in [0, 1), got {validation_share}.")
        self.model, self.max_tokens, self.seed = model, max_tokens, seed
        self.batch_size, self.validation_share = prompts_per_batch, validation_share

        def read(path: str) -> list[Rollout]:
            rows = read_rollouts(path, labelled=True, only_known_columns=not extra_columns)
            return without_empty(rows, path, drop=drop_empty)

        self.responses = read(path)
        self.validation_responses = None if validation_path is None else read(validation_path)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.lessons: list[Group] = []
        self.validation: list[Group] = []

    def setup(self, stage: str) -> None:
        """Load the tokenizer; group the responses by prompt, and set aside what is validated on."""
        self.tokenizer = load_tokenizer(self.model)
        groups = self._groups(self.responses)
        if self.validation_responses is not None:
            self.lessons, self.validation = groups, self._groups(self.validation_responses)
        else:
            order = permutation(len(groups), self.seed, VALIDATION_LAP)
            held_out = set(order[: round(self.validation_share * len(groups))].tolist())
            self.lessons = [group for i, group in enumerate(groups) if i not in held_out]
            self.validation = [group for i, group in enumerate(groups) if i in held_out]
        if len(self.lessons) < self.batch_size:
            raise ValueError(
                f"Expected at least one batch of {self.batch_size} prompts to train on, got {len(self.lessons)}. "
                "Lower `data.prompts_per_batch`."
            )
        labels = {one.verdict.score for group in self.lessons for one in group}
        if len(labels) < 2:
            raise ValueError(f"Expected right and wrong responses to learn from, got only the label {labels.pop()}.")

    def _groups(self, rollouts: Sequence[Rollout]) -> list[Group]:
        assert self.tokenizer is not None
        return grouped(rollouts, max_tokens=self.max_tokens, tokenizer=self.tokenizer)

    def train_dataloader(self) -> LessonLoader:
        """The loader of this rank."""
        assert self.trainer is not None
        if self.batch_size % self.trainer.world_size:
            raise ValueError(
                f"Expected `data.prompts_per_batch` to be divisible by the number of ranks, got {self.batch_size} "
                f"prompts on {self.trainer.world_size} ranks."
            )
        return LessonLoader.inside(self.trainer, self)

    def val_dataloader(self) -> DataLoader[Any]:
        """This rank's share of the prompts that are validated on, in as many batches as all others have.

        Scoring waits for all ranks, so one that has no prompt left gets batches that count for nothing.
        """
        assert self.trainer is not None
        rank, world, size = self.trainer.global_rank, self.trainer.world_size, self.batch_size
        mine, most = self.validation[rank::world], -(-len(self.validation) // world)
        parts = [mine[start : start + size] for start in range(0, most, size)]
        return DataLoader(parts, batch_size=None, collate_fn=self._validated)  # type: ignore[arg-type]

    def _validated(self, groups: list[Group]) -> Batch:
        return self.collate(groups) if groups else self.collate(self.validation[:1]).uncounted()

    def collate(self, groups: list[Group]) -> Batch:
        """Tokenize the responses of some prompts."""
        assert self.tokenizer is not None
        return Batch.of_groups([[tokenized(one, self.tokenizer) for one in group] for group in groups])


class PRMModule(pl.LightningModule):
    """An implicit PRM that learns outcomes offline (ImplicitPRM, arXiv 2412.01981).

    `r(y) = beta * sum_t log(prm(y_t) / reference(y_t))`, with any loss of `algorithms.prm_loss` on the labels.

    Args:
        prm: Hugging Face id or folder to start from.
        reference: The same for the frozen reference, with the PRM's tokenizer; null takes `prm` as it is now.
        loading: How models are loaded.
        beta: Reward per nat.
        step_separator: Text that ends a step, for the PRM's JSON file; training looks at whole responses only.
        prm_loss: `algorithms.ce`, `dpo`, `kto`, `nca`, or a function of yours.
        update: Gradient clip and micro-batches; more than one of its minibatches are optimizer steps of one batch.
        optimizer: Optimizer.
        warmup: Share of all batches in which the learning rate rises from 0; then it falls as a cosine, to 0.
        seed: Of the minibatches.
    """

    policy_role = "prm"
    command = ""
    """What started the run, for the model's card."""

    def __init__(
        self,
        prm: str,
        reference: str | None = None,
        loading: Loading = Loading(),
        beta: float = 0.05,
        step_separator: str = "\n\n",
        prm_loss: Callable[..., Any] = alg.ce,
        update: Update = Update(minibatches=1, grad_clip=10.0),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-7, weight_decay=0.0),
        warmup: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.stepper = Stepper(self, {"prm": update}, shared_prompts=loading.shares_prompts, seed=seed)
        self.names: dict[str, str | None] = {"prm": prm, "reference": reference or prm}
        self.loading, self.beta, self.step_separator, self.prm_loss = loading, beta, step_separator, prm_loss
        self.optimizer, self.warmup = optimizer, warmup
        self.rewards, self.outcomes, self.pairs = CatMetric(), CatMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        """Refuse what cannot train."""
        check_devices(self.trainer)

    def configure_model(self) -> None:
        """Load the models, once."""
        if hasattr(self, "prm"):
            return
        name, reference = str(self.names["prm"]), str(self.names["reference"])
        check_same_vocabulary("reference", reference, "PRM", name)
        self.tokenizer = load_tokenizer(name)
        self.prm = load_scoring(name, self.loading, self.stepper.devices)
        self.reference = load_scoring(reference, self.loading, self.stepper.devices).requires_grad_(False)

    def on_train_start(self) -> None:
        """Say so if a loss that compares responses to one prompt has nothing to compare."""
        groups = getattr(self.trainer.train_dataloader, "lessons", ())  # a loader of a user's own need not say
        lone = groups and all(len({r.verdict.score for r in group}) == 1 for group in groups)
        if lone and getattr(self.prm_loss, "whole_groups", True):
            warnings.warn(
                f"{import_path(self.prm_loss)} compares responses to one prompt, but no prompt here has right and "
                "wrong ones. Take `prime_lightning.algorithms.ce`, or sample more responses a prompt.",
                stacklevel=2,
            )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update on the labels of a batch of prompts."""
        stepper, measures = self.stepper, self.stepper.measures
        measures.clear()  # of what validation scored
        with stepper.one_step(["prm"]):
            optimise_prm(stepper, batch, stepper.score("reference", batch), self.prm_loss, self.beta)
        numbers = measures.means(stepper.all_reduce)
        numbers |= {"loss": numbers.get("prm/loss", 0.0), **stepper.learning_rates()}
        self.log_dict(numbers, prog_bar=False, batch_size=len(batch))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect rewards and labels."""
        prm_BT, reference_BT = self.stepper.score("prm", batch), self.stepper.score("reference", batch)
        reward_B = alg.process_reward(prm_BT, reference_BT, batch.mask_BT, beta=self.beta).sum(1)
        self.rewards.update(reward_B[batch.valid_B])
        self.outcomes.update(batch.outcome_B[batch.valid_B])
        right, count = alg.pairwise_accuracy(reward_B, batch.outcome_B, batch.group_B, batch.valid_B)
        self.pairs.update(right / count.clamp_min(1), weight=count)

    def on_validation_epoch_end(self) -> None:
        """Accuracy (`reward > 0` against `label > 0.5`), AUC, calibration error, CE, and rightly ordered pairs."""
        reward_B, outcome_B = self.rewards.compute(), self.outcomes.compute()
        valid_B = torch.ones_like(outcome_B, dtype=torch.bool)
        ce, count = alg.ce(reward_B, outcome_B, valid_B.long(), valid_B)
        numbers: dict[str, Tensor] = {
            "val/accuracy": ((reward_B > 0) == (outcome_B > 0.5)).float().mean(),
            "val/auc": alg.auc(reward_B, outcome_B, valid_B),
            "val/calibration_error": alg.calibration_error(reward_B, outcome_B, valid_B),
            "val/ce": ce / count,
            "val/pairwise_accuracy": self.pairs.compute(),
        }
        self.log_dict(numbers)
        for metric in (self.rewards, self.outcomes, self.pairs):
            metric.reset()

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Cosine schedule with warm-up over all batches of the run."""
        return cosine(self.optimizer(self.prm.parameters()), self.warmup, self.trainer)

    def metadata(self) -> dict[str, Any]:
        """What the PRM's JSON file says."""
        return {
            "names": self.names,
            "beta": self.beta,
            "granularity": "token",
            "step_separator": self.step_separator,
            "normalise": "none",
            "prm_loss": import_path(self.prm_loss),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in what a resumed run needs besides weights and optimizer, and what a reader has to know."""
        self.stepper.save(checkpoint, {"metadata": run_metadata(self)})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up."""
        self.stepper.restore(checkpoint)
