"""`RolloutDataModule`: prompts, engine, verifiers and filter as one Lightning data module that yields `Batch`es.

It knows nothing of the algorithm; a `PrimeModule` sends it the policy's weights through `sync`.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
import warnings
from collections.abc import Sized
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from transformers import PreTrainedTokenizerBase

from prime_lightning.engines import Engine
from prime_lightning.models.batch import Batch
from prime_lightning.models.pretrained import load_tokenizer, plain_folder, warn_of_padding
from prime_lightning.prompts.dataset import Prompts
from prime_lightning.rollout import Completion, Prompt, Sampling
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.sampling.ahead import AheadLoader
from prime_lightning.sampling.loader import Collecting, RolloutSource, Surplus, TrainingLoader
from prime_lightning.sampling.ranks import balanced
from prime_lightning.sampling.sync import PolicyWeights, send
from prime_lightning.sampling.validation import EvaluationLoader
from prime_lightning.verifiers import ReferenceReport, Verifiers


class RolloutDataModule(pl.LightningDataModule):
    """Streams graded rollouts.

    Args:
        model: Hugging Face id or folder of the policy, for the tokenizer and the engine's architecture.
        train: Prompts to train on.
        engine: What samples; see `prime_lightning.engines`.
        validation: Prompts of `validate` and of the validation during `fit`.
        sampling: How training rollouts are drawn; `samples` is the paper's K.
        validation_sampling: How validation rollouts are drawn.
        validation_prompts: How many of the validation prompts are taken; of fewer rows, each equally often.
        prompts_per_batch: Groups of one iteration, over all ranks.
        chat_template_kwargs: Variables of the tokenizer's chat template for all prompts that use it, such as
            `enable_thinking: false`; those of a prompt's own template go before.
        max_prompt_tokens: Longer prompts are skipped and counted, as are those that leave no room for
            `sampling.max_tokens` in the engine's context.
        accuracy_filter: Which groups are trained on.
        oversample: Prompts in work for each group that is missing. Above 1 the engine is better filled, and some are
            left over when the batch is full: see `surplus`. `auto` takes as many as the filter's acceptance of the last
            batches asks for, at most 10.
        surplus: What becomes of those. `drop`: they are sampled anew for the next batch, by its weights; batches are
            those of `oversample: 1`, exactly on-policy and of unbiased length. `keep`: they are finished, and
            trained on one iteration later (the policy lag is logged); the batch waits for the longest of them.
        max_staleness: How many iterations old the weights may be that sampled a token. 0 is synchronous: sampling and
            training take turns, exactly on-policy. Above 0 the next batches are sampled while the trainer works.
        patience: Stop with an error once this many times `prompts_per_batch` groups were sampled for one batch.
        check_answers: Before training, check that each reference answer (and reference program) passes its own
            verifier; rows whose reference does not are reported and left out.
        balance: On several ranks, deal the groups of a batch to them anew, by tokens, before they are trained on.
        verifiers: What grades.
    """

    def __init__(
        self,
        model: str,
        train: Prompts,
        engine: Engine,
        validation: Prompts | None = None,
        sampling: Sampling = Sampling(),
        validation_sampling: Sampling = Sampling(samples=1),
        validation_prompts: int = 256,
        chat_template_kwargs: dict[str, Any] | None = None,
        prompts_per_batch: int = 256,
        max_prompt_tokens: int = 1024,
        accuracy_filter: AccuracyFilter = AccuracyFilter(),
        oversample: float | Literal["auto"] = 1.0,
        surplus: Surplus = "drop",
        max_staleness: int = 0,
        patience: int = 20,
        check_answers: bool = True,
        balance: bool = True,
        verifiers: Verifiers | None = None,
    ) -> None:
        super().__init__()
        if max_staleness < 0:
            raise ValueError(
                f"Expected `data.max_staleness` of 0 (synchronous) or more iterations, got {max_staleness}."
            )
        for name, value in (
            ("prompts_per_batch", prompts_per_batch),
            ("oversample", 1 if oversample == "auto" else oversample),
            ("patience", patience),
        ):
            if value < 1:
                raise ValueError(f"Expected `data.{name}` of at least 1, got {value}.")
        if sampling.samples < accuracy_filter.min_valid:
            raise ValueError(
                f"Expected `data.sampling.samples` of at least the filter's `min_valid` {accuracy_filter.min_valid}, "
                f"got {sampling.samples}: every group would be rejected. A baseline needs two samples; for reinforce, "
                "which has none, set `data.accuracy_filter.min_valid` to 1."
            )
        self.model, self.train, self.engine, self.validation = model, train, engine, validation
        if chat_template_kwargs:  # prompts of the user's own may have no template
            for part in [*train.parts(), *(validation.parts() if validation else ())]:
                part.template = part.template.with_variables(chat_template_kwargs)
        self.sampling, self.validation_sampling = sampling, validation_sampling
        self.validation_prompts = validation_prompts
        self.prompts_per_batch, self.max_prompt_tokens = prompts_per_batch, max_prompt_tokens
        self.accuracy_filter, self.oversample, self.patience = accuracy_filter, oversample, patience
        self.surplus = surplus
        self.max_staleness, self.check_answers, self.balance = max_staleness, check_answers, balance
        self.verifiers = verifiers or Verifiers()
        self.most_rejected: float | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._lock = threading.Lock()  # training and evaluation take turns at the engine

    def setup(self, stage: str) -> None:
        """Load the tokenizer and start the engine."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model)
            if not self.sampling.mask_padding:
                warn_of_padding(self.model, self.tokenizer)
            self._try_prompts(self.tokenizer)
            with plain_folder(self.model) as model:
                self.engine.start(model)
        if stage == "fit" and self.check_answers:
            self._drop_unusable()

    def _try_prompts(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The first prompt of each source, before anything is loaded: template, chat template and row must agree."""
        for source in (self.train, self.validation):
            for part in source.parts() if source else ():
                part.prompt(0, tokenizer)

    def _drop_unusable(self) -> None:
        """Leave rows out whose reference answer its own verifier does not accept; one rank checks for all."""
        for part in self.train.parts():
            report = self._checked(part)
            if report.bad:
                warnings.warn(str(report), stacklevel=2)
                if not report.usable:
                    raise ValueError(f"Expected usable reference answers in {part.source!r}, got none: {report}.")
                part.keep(report.usable)

    def _checked(self, part: Prompts) -> ReferenceReport:
        """What rank 0 finds, on all ranks."""
        if self.trainer is None:
            return self.verifiers.check_references(part.references())
        report = self.verifiers.check_references(part.references()) if self.trainer.is_global_zero else None
        return self.trainer.strategy.broadcast(report)  # type: ignore[return-value]

    def sync(self, weights: PolicyWeights, version: int) -> None:
        """Sample with these weights from now on."""
        send(self.engine, weights, version)

    def greedy(self, prompts: int, tokens: int) -> list[tuple[Prompt, Completion]]:
        """What the engine answers to some training prompts when it samples greedily, in the order of the prompts.

        Args:
            prompts: How many; fewer where most of the first ones are too long.
            tokens: Of an answer, at most, and no more than training samples.
        """
        assert self.tokenizer is not None
        sampling = Sampling(samples=1, max_tokens=min(tokens, self.sampling.max_tokens), temperature=0.0)
        longest = min(self.max_prompt_tokens, self.source(self.train).longest_prompt(sampling))
        first = (self.train.prompt(draw, self.tokenizer) for draw in range(8 * prompts))
        asked = list(itertools.islice((prompt for prompt in first if len(prompt.token_ids) <= longest), prompts))
        with self._lock:
            answers = [(prompt, done) for prompt, (done,) in self.engine.stream(asked, sampling)]
        return sorted(answers, key=lambda answer: answer[0].draw)

    def rest(self) -> None:
        """Let the engine give its memory up until the next `sync`, where it does not sample ahead."""
        if self.max_staleness == 0:
            self.engine.sleep()

    def hand_on_rejected(self, most: float) -> None:
        """Let batches bring the groups that the filter rejected, at most so many for each accepted one."""
        self.most_rejected = most

    def masked(self, sampling: Sampling) -> Sampling:
        """A sampling under the mask of `mask_padding`, where training has it."""
        return replace(sampling, mask_padding=True) if self.sampling.mask_padding else sampling

    def source(self, prompts: Prompts) -> RolloutSource:
        """These prompts through this module's engine and verifiers."""
        assert self.tokenizer is not None
        return RolloutSource(
            prompts=prompts, tokenizer=self.tokenizer, engine=self.engine, verifiers=self.verifiers, lock=self._lock
        )

    def train_dataloader(self) -> TrainingLoader | AheadLoader:
        """The stream of batches.

        It has a length, because Lightning fetches one item ahead from a loader without one, which would sample each
        batch with weights that are one iteration old.
        """
        assert self.trainer is not None
        if self.trainer.max_steps < 1:
            raise ValueError("Expected `trainer.max_steps`, the number of iterations, got none. Set it in the config.")
        loader = self.training_loader(self.trainer.global_rank, self.trainer.world_size)
        return AheadLoader(loader, self.max_staleness) if self.max_staleness else loader

    def training_loader(self, rank: int, world: int) -> TrainingLoader:
        """One rank's share of the batches."""
        if self.prompts_per_batch % world:
            raise ValueError(
                f"Expected `data.prompts_per_batch` to be divisible by the number of ranks, got "
                f"{self.prompts_per_batch} prompts on {world} ranks."
            )
        groups, most = self.prompts_per_batch // world, self.most_rejected
        collecting = Collecting(
            groups=groups,
            sampling=self.sampling,
            accuracy_filter=self.accuracy_filter,
            max_prompt_tokens=self.max_prompt_tokens,
            oversample=self.oversample,
            patience=self.patience,
            surplus=self.surplus,
            max_age=max(self.max_staleness, int(self.surplus == "keep")),
            hand_on=None if most is None else math.ceil(most * groups),
        )
        return TrainingLoader(self.source(self.train), collecting, rank, world)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Even out the work of the ranks; here, because in the trainer's own thread collectives keep their order."""
        assert self.trainer is not None
        if not (self.balance and self.trainer.training and self.trainer.world_size > 1):
            return batch
        rejected = None if batch.rejected is None else balanced(batch.rejected)
        return replace(balanced(batch), rejected=rejected)

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Validation rollouts, or nothing if there are no validation prompts."""
        if self.validation is None:
            return []
        assert self.trainer is not None
        chunk = max(1, self.prompts_per_batch // self.trainer.world_size)
        return EvaluationLoader(
            self.source(self.validation),
            self.validation_sampling,
            self._asked(self.validation),
            chunk,
            self.trainer.global_rank,
            self.trainer.world_size,
        )

    def _asked(self, prompts: Prompts) -> int:
        """Validation prompts; each row equally often, where there are fewer rows than that."""
        rows, asked = len(prompts) if isinstance(prompts, Sized) else None, self.validation_prompts
        if rows is None or asked <= rows or asked % rows == 0:
            return asked
        even = asked - asked % rows
        warnings.warn(
            f"Validation asks {even} prompts instead of {asked} (`data.validation_prompts`): each of the {rows} rows "
            f"of {prompts.source!r} {even // rows} times, so that none counts more.",
            stacklevel=2,
        )
        return even

    def test_dataloader(self) -> EvaluationLoader | list[Any]:
        """The same as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EvaluationLoader | list[Any]:
        """The same as for validation."""
        return self.val_dataloader()

    def on_exception(self, exception: BaseException) -> None:
        """End what runs beside the trainer."""
        self.close()

    def teardown(self, stage: str) -> None:
        """End what runs beside the trainer."""
        self.close()

    def close(self) -> None:
        """Close engine and verifiers; the next `setup` starts the engine again."""
        self.engine.close()
        self.verifiers.close()
        self.verifiers = copy.copy(self.verifiers)  # a fresh one, which starts its workers when it is used
        self.tokenizer = None
