"""Prompts -> engine -> verifiers -> accuracy filter -> whole groups -> `Batch`: the data side of one PRIME iteration.

The loader of `RolloutDataModule` makes one batch of rollouts an item, with the weights that the engine has at that
moment. It has a length, because Lightning fetches one item ahead from a loader without one, which would sample each
batch with weights that are one iteration old.

It knows nothing of the algorithm; who sends weights to the engine is a callback.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from transformers import PreTrainedTokenizerBase

from prime_lightning.batch import Batch
from prime_lightning.engines import Engine
from prime_lightning.pretrained import load_tokenizer
from prime_lightning.prompts import Prompts
from prime_lightning.rollout import Completion, Finish, Group, Label, Prompt, Rollout, Sampling, Verdict
from prime_lightning.tally import Tally
from prime_lightning.verifiers import Verifiers

LONG_PROMPTS_IN_A_ROW = 10_000
ENDLESS = 10**9


@dataclass(frozen=True, kw_only=True)
class AccuracyFilter:
    """Which groups are worth training on (PRIME, arXiv 2502.01456, section 4: accuracy between 0.2 and 0.8).

    Example:
        >>> AccuracyFilter(low=0.2, high=0.8).verdict_on([1.0, 1.0, 1.0, 1.0])
        'too_easy'
    """

    low: float = 0.2
    """Least mean outcome of a group; set 0 to keep groups without a right answer."""
    high: float = 0.8
    """Greatest mean outcome of a group; set 1 to keep groups without a wrong answer."""
    min_valid: int = 2
    """Fewest members with a verdict."""
    truncated: Literal["keep", "mask", "reject"] = "keep"
    """Responses that hit the token limit: learn from them, leave them out, or reject their group."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"Expected 0 <= low <= high <= 1 in the accuracy filter, got {self.low} and {self.high}.")
        if self.min_valid < 1:
            raise ValueError(f"Expected the accuracy filter's `min_valid` to be at least 1, got {self.min_valid}.")

    def verdict_on(self, outcomes: Sequence[float]) -> str | None:
        """Why a group with these known outcomes is rejected; None if it is accepted."""
        if len(outcomes) < self.min_valid:
            return "few_valid"
        accuracy = sum(outcomes) / len(outcomes)
        return "too_hard" if accuracy < self.low else "too_easy" if accuracy > self.high else None

    def reject(self, group: Group) -> str | None:
        """Why this group is rejected; None if it is accepted."""
        truncated = [rollout.completion.truncated for rollout in group]
        if self.truncated == "reject" and any(truncated):
            return "truncated"
        drop = [self.truncated == "mask" and cut for cut in truncated]
        kept = [rollout for rollout, out in zip(group, drop, strict=True) if rollout.verdict.known and not out]
        return self.verdict_on([rollout.verdict.score for rollout in kept])


class RolloutSource:
    """Samples and grades; shared by the training and the evaluation loaders."""

    def __init__(self, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, engine: Engine, verifiers: Verifiers):
        self.prompts, self.tokenizer, self.engine, self.verifiers = prompts, tokenizer, engine, verifiers

    def roll_out(self, prompts: Sequence[Prompt], sampling: Sampling, tally: Tally) -> list[Group]:
        """One group a prompt, in the order of the prompts. Grading runs while later groups are sampled."""
        pending = []
        with tally.timed("sample"):
            for prompt, completions in self.engine.stream(prompts, sampling):
                verdicts = [self.verifiers.submit(prompt, completion.text) for completion in completions]
                pending.append((prompt, completions, verdicts))
        with tally.timed("verify"):
            groups = [
                [
                    Rollout(prompt=prompt, completion=completion, verdict=verdict.result())
                    for completion, verdict in zip(completions, verdicts, strict=True)
                ]
                for prompt, completions, verdicts in pending
            ]
        return sorted(groups, key=lambda group: group[0].prompt.draw)


class TrainingLoader:
    """One item = one `Batch` of `groups` accepted groups, sampled on demand; it never ends, `trainer.max_steps` does.

    Position and surplus are saved and restored, so a resumed run goes on with the very next prompt.
    """

    def __init__(self, source: RolloutSource, options: RolloutDataModule, rank: int, world: int) -> None:
        if options.prompts_per_batch % world:
            raise ValueError(
                f"Expected `data.prompts_per_batch` to be divisible by the number of ranks, got "
                f"{options.prompts_per_batch} prompts on {world} ranks."
            )
        self.source, self.options, self.rank, self.world = source, options, rank, world
        self.groups = options.prompts_per_batch // world
        self.position = 0
        self.surplus: list[Group] = []

    def __len__(self) -> int:
        """More iterations than any run has, so that a finished run can be resumed for more."""
        return ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.collect()

    def collect(self) -> Batch:
        """Sample rounds of prompts until the batch is full; what is accepted beyond that waits for the next one."""
        options, tally = self.options, Tally()
        accepted, self.surplus = self.surplus, []
        while len(accepted) < self.groups:
            prompts = self.take(math.ceil((self.groups - len(accepted)) * options.oversample), tally)
            for group in self.source.roll_out(prompts, options.sampling, tally):
                reason = options.accuracy_filter.reject(group)
                tally.add(group, reason)
                if reason is None:
                    accepted.append(group)
            self._watch(tally, len(accepted))
        self.surplus = accepted[self.groups :]
        tally.metrics["rollout/surplus_groups"] = len(self.surplus)
        return Batch.of_groups(
            accepted[: self.groups],
            keep_truncated=options.accuracy_filter.truncated != "mask",
            temperature=options.sampling.temperature,
            metrics=tally.summary(),
        )

    def take(self, count: int, tally: Tally) -> list[Prompt]:
        """The next prompts of this rank, without those that are too long."""
        taken: list[Prompt] = []
        skipped = 0
        while len(taken) < count:
            prompt = self.source.prompts.prompt(self.position * self.world + self.rank, self.source.tokenizer)
            self.position += 1
            if len(prompt.token_ids) <= self.options.max_prompt_tokens:
                taken.append(prompt)
                continue
            tally.metrics["rollout/long_prompts"] += 1
            skipped += 1
            if skipped >= LONG_PROMPTS_IN_A_ROW:
                raise ValueError(
                    f"Expected prompts of at most {self.options.max_prompt_tokens} tokens, got {skipped} longer "
                    f"ones in a row (the last has {len(prompt.token_ids)}). Raise `data.max_prompt_tokens`."
                )
        return taken

    def _watch(self, tally: Tally, accepted: int) -> None:
        """Complain when the filter leaves too little: a run that samples for ever looks like one that works."""
        limit = self.options.patience * self.groups
        if accepted >= self.groups or tally.groups <= limit / 2:
            return
        message = (
            f"The accuracy filter accepted {accepted} of {tally.groups} groups of this batch, which needs "
            f"{self.groups} (mean outcome {tally.accuracy:.3f}; rejected: {tally.rejected()}). Widen "
            "`data.accuracy_filter`, raise `data.sampling.samples`, or take prompts that suit the model."
        )
        if tally.groups > limit:
            raise ValueError(f"{message} It stops here because of `data.patience` {self.options.patience}.")
        warnings.warn(message, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Position in the prompt order, and the surplus as JSON, which reads back exactly."""
        groups = [[_state(rollout) for rollout in group] for group in self.surplus]
        return {"position": self.position, "surplus": json.dumps(groups)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved position."""
        self.position = state["position"]
        self.surplus = [[self._restore(row) for row in group] for group in json.loads(state["surplus"])]

    def _restore(self, row: dict[str, Any]) -> Rollout:
        completion = {**row["completion"], "finish": Finish(row["completion"]["finish"])}
        verdict = {**row["verdict"], "label": Label(row["verdict"]["label"])}
        prompt = self.source.prompts.prompt(row["draw"], self.source.tokenizer)
        return Rollout(prompt=prompt, completion=Completion(**completion), verdict=Verdict(**verdict))


def _state(rollout: Rollout) -> dict[str, Any]:
    """A rollout without its prompt, which its draw gives back."""
    return {
        "draw": rollout.prompt.draw,
        "completion": asdict(rollout.completion),
        "verdict": asdict(rollout.verdict),
    }


class EvaluationLoader:
    """One item = one unfiltered `Batch` of a fixed list of prompts, sampled with the engine's present weights."""

    def __init__(
        self, source: RolloutSource, sampling: Sampling, count: int, chunk: int, rank: int, world: int
    ) -> None:
        self.source, self.sampling, self.chunk = source, sampling, chunk
        self.draws = range(rank, count, world)

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self.draws) / self.chunk)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.draws), self.chunk):
            draws = self.draws[start : start + self.chunk]
            prompts = [self.source.prompts.prompt(draw, self.source.tokenizer) for draw in draws]
            tally = Tally()
            groups = self.source.roll_out(prompts, self.sampling, tally)
            for group in groups:
                tally.add(group, None)
            yield Batch.of_groups(groups, metrics=tally.summary())


class RolloutDataModule(pl.LightningDataModule):
    """Streams graded rollouts.

    Args:
        model: Hugging Face id or folder of the policy, for the tokenizer and the engine's architecture.
        train: Prompts to train on.
        engine: What samples; see `prime_lightning.engines`.
        validation: Prompts of `validate` and of the validation during `fit`.
        sampling: How training rollouts are drawn; `samples` is the paper's K.
        validation_sampling: How validation rollouts are drawn.
        validation_prompts: How many of the validation prompts are taken.
        prompts_per_batch: Groups of one iteration, over all ranks.
        max_prompt_tokens: Longer prompts are skipped and counted.
        accuracy_filter: Which groups are trained on.
        oversample: Prompts sampled for each group that is missing. Above 1 there are fewer, larger rounds, and the
            accepted surplus is trained on one iteration later (the policy lag is logged); 1 is exactly on-policy.
        patience: Stop with an error once this many times `prompts_per_batch` groups were sampled for one batch.
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
        prompts_per_batch: int = 256,
        max_prompt_tokens: int = 1024,
        accuracy_filter: AccuracyFilter = AccuracyFilter(),
        oversample: float = 1.0,
        patience: int = 20,
        verifiers: Verifiers | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("prompts_per_batch", prompts_per_batch),
            ("oversample", oversample),
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
        self.sampling, self.validation_sampling = sampling, validation_sampling
        self.validation_prompts = validation_prompts
        self.prompts_per_batch, self.max_prompt_tokens = prompts_per_batch, max_prompt_tokens
        self.accuracy_filter, self.oversample, self.patience = accuracy_filter, oversample, patience
        self.verifiers = verifiers or Verifiers()
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer and start the engine."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model)
            self.engine.start(self.model)

    def source(self, prompts: Prompts) -> RolloutSource:
        """These prompts through this module's engine and verifiers."""
        assert self.tokenizer is not None
        return RolloutSource(prompts, self.tokenizer, self.engine, self.verifiers)

    def train_dataloader(self) -> TrainingLoader:
        """The stream of batches."""
        assert self.trainer is not None
        if self.trainer.max_steps < 1:
            raise ValueError("Expected `trainer.max_steps`, the number of iterations, got none. Set it in the config.")
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return TrainingLoader(self.source(self.train), self, rank, world)

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Validation rollouts, or nothing if there are no validation prompts."""
        if self.validation is None:
            return []
        assert self.trainer is not None
        chunk = max(1, self.prompts_per_batch // self.trainer.world_size)
        return EvaluationLoader(
            self.source(self.validation),
            self.validation_sampling,
            self.validation_prompts,
            chunk,
            self.trainer.global_rank,
            self.trainer.world_size,
        )

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
