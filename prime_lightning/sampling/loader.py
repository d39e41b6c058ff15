"""Prompts -> engine -> verifiers -> accuracy filter -> whole groups -> `Batch`, one batch on demand.

Groups are decided in the order of their prompts, whatever order they finish in, so that a batch does not depend on
speed and short answers have no advantage. A rejected group is replaced by the next prompt at once. Sampling stops as
soon as the batch is full. With `surplus: drop` the prompts behind it that were begun go back to the front of the queue
and are sampled anew, by the next weights, whether their groups were finished or not: a batch is then the one that
sampling without surplus gives. With `keep` every group that was begun is finished, and waits for the next batch. To
keep finished ones and begin the others again would favour short answers, for a prompt would keep its first group if
that was short.

Finished samples of groups that are begun again are used as long as the weights are those that drew them: the seeds
would give the same samples then, so they save time and change nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from prime_lightning.engines import Engine, FinishedSamples, check_truncated_logprobs
from prime_lightning.models.batch import Batch
from prime_lightning.prompts.dataset import Prompts
from prime_lightning.rollout import Completion, Group, Prompt, Rollout, Sampling, Verdict
from prime_lightning.sampling.acceptance import Acceptance, AccuracyFilter, Tally
from prime_lightning.sampling.ranks import redistribute, restored, saved
from prime_lightning.verifiers import Verifiers

LONG_PROMPTS_IN_A_ROW = 10_000
ENDLESS = 10**9
Surplus = Literal["drop", "keep"]
"""What becomes of prompts that were begun when a batch is full."""
UNKNOWN_ALARM = 0.01


@dataclass(kw_only=True)
class RolloutSource:
    """What samples and what grades; shared by the training and the evaluation loaders, one of them at a time."""

    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    verifiers: Verifiers
    lock: threading.Lock = field(default_factory=threading.Lock)

    def longest_prompt(self, sampling: Sampling) -> float:
        """Tokens that a prompt may have beside `max_tokens` in the engine's context; no limit where none is known.

        Raises:
            ValueError: if there is no room for a prompt.
        """
        context = self.engine.context
        if context is not None and sampling.max_tokens >= context:
            raise ValueError(
                f"Expected prompt and completion to fit the model's {context} positions, got max_tokens "
                f"{sampling.max_tokens}, which leaves no room for a prompt. Lower `max_tokens`."
            )
        return math.inf if context is None else context - sampling.max_tokens


Graded = tuple[Prompt, list[Completion], list[Future[Verdict]]]


class Round:
    """Graded groups of prompts, in the prompts' order; grading runs while later groups are still sampled.

    Args:
        source: What samples and grades.
        prompts: To begin with; `add` adds more while it runs.
        sampling: How completions are drawn.
        tally: Takes the seconds.
        finished: Finished samples of groups that are not whole, see `Engine.stream`; None keeps none.
    """

    def __init__(
        self,
        source: RolloutSource,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        tally: Tally,
        finished: FinishedSamples | None = None,
    ) -> None:
        self.source, self.sampling, self.tally = source, sampling, tally
        self.undecided = deque(prompts)
        self._options: dict[str, Any] = {} if finished is None else {"finished": finished}
        self._grading: dict[int, Graded] = {}
        self._open()

    def __iter__(self) -> Iterator[Group]:
        while self.undecided:
            self._advance(until=self.undecided[0].draw)
            yield self._graded(self.undecided.popleft())

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Begin with these, too, behind the others."""
        self.undecided.extend(prompts)
        self._asked.extend(prompts)

    def close(self) -> list[Prompt]:
        """Stop sampling; returns the prompts whose groups were not taken."""
        self._stream.close()  # type: ignore[attr-defined]
        return list(self.undecided)

    def _open(self) -> None:
        """Ask for all groups that are not finished; the engine sees what is added to the list."""
        self._asked = [prompt for prompt in self.undecided if prompt.draw not in self._grading]
        self._stream = self.source.engine.stream(self._asked, self.sampling, **self._options)

    def _advance(self, until: int) -> None:
        """Sample until this prompt's group is finished; hand every finished group to the verifiers."""
        with self.tally.timed("sample"):
            while until not in self._grading:
                prompt, completions = next(self._stream, None) or self._again()
                verdicts = [self.source.verifiers.submit(prompt, completion.text) for completion in completions]
                self._grading[prompt.draw] = prompt, completions, verdicts

    def _again(self) -> tuple[Prompt, list[Completion]]:
        """The first group of another stream, after one that ended before it saw what was added.

        Raises:
            RuntimeError: if there is none.
        """
        self._open()
        group = next(self._stream, None)
        if group is None:
            raise RuntimeError(f"Expected groups of {len(self._asked)} prompts of the engine, got none.")
        return group

    def _graded(self, prompt: Prompt) -> Group:
        prompt, completions, verdicts = self._grading.pop(prompt.draw)
        with self.tally.timed("verify"):
            return [
                Rollout(prompt=prompt, completion=completion, verdict=verdict.result())
                for completion, verdict in zip(completions, verdicts, strict=True)
            ]


@dataclass(frozen=True, kw_only=True)
class Collecting:
    """How a batch is filled."""

    groups: int
    """Accepted groups of one batch on this rank."""
    sampling: Sampling
    accuracy_filter: AccuracyFilter
    max_prompt_tokens: int
    oversample: float | Literal["auto"]
    patience: int
    surplus: Surplus
    max_age: int
    """Iterations that the weights of a token may be old when it is trained on."""
    hand_on: int | None = None
    """Most rejected groups that are handed on beside a batch; None hands nothing on."""


class TrainingLoader:
    """One item = one `Batch` of accepted groups, sampled on demand; it never ends, `trainer.max_steps` does.

    Position, queue and surplus are saved and restored, so a resumed run goes on with the very next prompt.
    """

    def __init__(self, source: RolloutSource, options: Collecting, rank: int, world: int) -> None:
        self.source, self.options, self.rank, self.world = source, options, rank, world
        self.start = self.position = 0  # draw of the first prompt of all ranks; prompts taken by this one
        self.returned: deque[int] = deque()  # draws to sample again before any new one
        self.surplus: list[Group] = []
        self.rejected: list[Group] = []  # while this batch is filled
        self.acceptance = Acceptance()
        self.finished: FinishedSamples = {}
        self._checked = options.sampling.truncation == 0 or options.sampling.temperature == 0
        self.tally: Tally | None = None  # of the batch that is being filled, for the progress bar

    def __len__(self) -> int:
        """More iterations than any run has, so that a finished run can be resumed for more."""
        return ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.collect()

    def collect(self, trained_at: int | None = None) -> Batch:
        """Sample prompts until the batch is full.

        Args:
            trained_at: Iteration that trains on it; None is that of the engine's present weights.
        """
        options, self.tally = self.options, (tally := Tally(self.options.groups))
        accepted = self._fresh(self.surplus, tally, self.source.engine.version if trained_at is None else trained_at)
        self.surplus, self.rejected = [], []
        self.acceptance.next_batch()
        if len(accepted) < options.groups:
            with self.source.lock:
                accepted += self._sampled(options.groups - len(accepted), tally)
        self.surplus, self.tally = accepted[options.groups :], None
        tally.metrics["rollout/surplus_groups"] = len(self.surplus)
        if tally.responses - tally.known > UNKNOWN_ALARM * tally.responses:
            warnings.warn(f"More than {UNKNOWN_ALARM:.0%} of verdicts are unknown ({tally.rejected()}).", stacklevel=2)
        batch = replace(self._batch(accepted[: options.groups]), metrics=tally.measures())
        return batch if options.hand_on is None else replace(batch, rejected=self._beside(batch))

    def _batch(self, groups: list[Group]) -> Batch:
        return Batch.of_groups(
            groups,
            keep_truncated=self.options.accuracy_filter.truncated == "keep",
            temperature=self.options.sampling.temperature,
            masked=self.options.sampling.mask_padding,
            truncation=self.options.sampling.truncation,
            rank=self.rank,
            world=self.world,
        )

    def _beside(self, batch: Batch) -> Batch:
        """The rejected groups that a batch hands on."""
        return self._batch(self.rejected) if self.rejected else batch.nothing()

    def _started(self, missing: int) -> int:
        """Prompts that are to be undecided where this many groups are missing."""
        oversample = self.options.oversample
        return self.acceptance.prompts(missing) if oversample == "auto" else math.ceil(missing * oversample)

    def _sampled(self, wanted: int, tally: Tally) -> list[Group]:
        """This many accepted groups, in the order of their prompts; with `surplus: keep` all that were begun."""
        accepted: list[Group] = []
        finished = self._same_weights()
        prompts = self.take(self._started(wanted), tally)
        self._check(prompts[0])
        sampled = Round(self.source, prompts, self.options.sampling, tally, finished)
        for group in sampled:
            accepted += self._filtered(group, tally)
            missing = wanted - len(accepted)
            if missing <= 0 and self.options.surplus == "drop":
                break
            self._watch(tally, missing)
            sampled.add(self.take(self._started(max(missing, 0)) - len(sampled.undecided), tally))
        dropped = sampled.close()
        tally.metrics["rollout/dropped_prompts"] = len(dropped)
        self.returned.extendleft(prompt.draw for prompt in reversed(dropped))
        return accepted

    def _check(self, prompt: Prompt) -> None:
        """Once, before the first round: log-probs that do not know of top-p would spoil the importance weights."""
        if not self._checked:
            check_truncated_logprobs(self.source.engine, prompt, self.options.sampling)
            self._checked = True

    def _same_weights(self) -> FinishedSamples | None:
        """The finished samples of aborted groups that the present weights would draw again; None if there are none."""
        if self.options.max_age == 0 or self.options.surplus == "keep":
            return None  # nothing is begun twice with the same weights
        present = {self.source.engine.version}
        groups = {
            draw: {k: sample for k, sample in group.items() if set(sample.versions) == present}
            for draw, group in self.finished.items()
        }
        self.finished = {draw: group for draw, group in groups.items() if group}
        return self.finished

    def _filtered(self, group: Group, tally: Tally) -> list[Group]:
        reason = self.options.accuracy_filter.reject(group)
        self.source.prompts.learn(group[0].prompt.draw, [r.verdict.score for r in group if r.verdict.known])
        tally.add(group, reason)
        self.acceptance.add(accepted=int(reason is None), decided=1)
        if reason is None:
            return [group]
        if len(self.rejected) < (self.options.hand_on or 0):
            self.rejected.append(group)
            tally.metrics["rollout/handed_on"] += 1
        return []

    def _fresh(self, groups: list[Group], tally: Tally, trained_at: int) -> list[Group]:
        """Groups that are not too old to be trained on then; the others are dropped and counted."""
        oldest = trained_at - self.options.max_age
        fresh = [g for g in groups if all(version >= oldest for r in g for version in r.completion.versions)]
        tally.metrics["rollout/stale_groups"] += len(groups) - len(fresh)
        return fresh

    def take(self, count: int, tally: Tally) -> list[Prompt]:
        """The next prompts of this rank that are not too long: returned ones first, then new ones."""
        if self.options.max_age > 0:
            again = itertools.islice(self.returned, max(count, 0))
            tally.metrics["rollout/kept_samples"] += sum(len(self.finished.get(draw, ())) for draw in again)
        room = self.source.longest_prompt(self.options.sampling)
        longest, draws = min(self.options.max_prompt_tokens, room), self._draws(tally)
        taken: list[Prompt] = []
        skipped = 0
        while len(taken) < count:
            prompt = self._prompt(next(draws))
            if len(prompt.token_ids) <= longest:
                taken.append(prompt)
                continue
            tally.metrics["rollout/long_prompts"] += 1
            skipped += 1
            if skipped >= LONG_PROMPTS_IN_A_ROW:
                raise ValueError(
                    f"Expected prompts of at most {longest} tokens, got {skipped} longer ones in a row (the last has "
                    f"{len(prompt.token_ids)}). Raise `data.max_prompt_tokens` ({self.options.max_prompt_tokens}), or "
                    f"lower `data.sampling.max_tokens` ({self.options.sampling.max_tokens}), which shares the engine's "
                    f"context of {self.source.engine.context} tokens with the prompt."
                )
        return taken

    def _draws(self, tally: Tally) -> Iterator[int]:
        """Returned draws, then new ones that are wanted."""
        while True:
            if self.returned:
                yield self.returned.popleft()
                continue
            draw, self.position = self.start + self.position * self.world + self.rank, self.position + 1
            if self.source.prompts.wanted(draw):
                yield draw
            else:
                tally.metrics["rollout/passed_over"] += 1

    def _prompt(self, draw: int) -> Prompt:
        return self.source.prompts.prompt(draw, self.source.tokenizer)

    def _watch(self, tally: Tally, missing: int) -> None:
        """Complain when the filter leaves too little: a run that samples for ever looks like one that works."""
        groups, most = self.options.groups, self.options.patience * self.options.groups
        if missing <= 0 or tally.groups not in (most // 2 + 1, most + 1):
            return
        message = (
            f"The accuracy filter accepted {groups - missing} of {tally.groups} groups of this batch, which needs "
            f"{groups} (mean outcome {tally.accuracy:.3f}; rejected: {tally.rejected()}). Widen "
            "`data.accuracy_filter`, raise `data.sampling.samples`, or take prompts that suit the model."
        )
        if tally.groups > most:
            raise ValueError(f"{message} It stops here because of `data.patience` {self.options.patience}.")
        warnings.warn(message, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Position in the prompt order, the queue, and the surplus as JSON, which reads back exactly."""
        surplus = json.dumps([[saved(rollout) for rollout in group] for group in self.surplus])
        return {
            "start": self.start,
            "position": self.position,
            "returned": list(self.returned),
            "surplus": surplus,
            "acceptance": asdict(self.acceptance),
            "order": self.source.prompts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up this rank's share of the saved positions of all ranks (`{"ranks": [state, ...]}`), or one state."""
        state = redistribute(state["ranks"], self.rank, self.world) if "ranks" in state else state
        self.start, self.position, self.returned = state["start"], state["position"], deque(state["returned"])
        self.source.prompts.load_state_dict(state.get("order", {}))
        self.surplus = [[self._restored(row) for row in group] for group in json.loads(state["surplus"])]
        self.acceptance, self.finished = Acceptance(**state.get("acceptance", {})), {}

    def _restored(self, row: dict[str, Any]) -> Rollout:
        return restored(row, self._prompt(row["draw"]))
