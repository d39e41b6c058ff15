"""How the PRM of a `PrimeModule` learns: from which rollouts, how often, and since when.

By default from the accepted rollouts of the iteration, once, as in PRIME, arXiv 2502.01456, Algorithm 1. The other ways
are ours; `docs/prm_learning.md` has their equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prime_lightning import algorithms as alg
from prime_lightning.models.batch import Batch, join, padded_cat
from prime_lightning.training.panel import PanelModule
from prime_lightning.training.passes import PassesModule
from prime_lightning.training.replay import Lessons, Replay


class LearningModule(PanelModule, PassesModule):
    """The side of `PrimeModule` that trains the PRM."""

    prm_loss: Callable[..., Any]
    replay: Replay
    shaping: Callable[..., Any] | None
    base_rate: alg.BaseRate
    seen_right: float = 0.0
    """Right answers of all lessons so far, over all ranks."""
    accepted: int | None = None
    """Groups of the batch that the filter accepted, where others follow them that have a process reward alone."""
    _labels: tuple[int, float] = (-1, 0.0)
    """Iteration whose labels were counted last, and the intercept before."""

    @property
    def intercept(self) -> float:
        """What the PRM's loss added to response rewards before this iteration's labels."""
        iteration, before = self._labels
        return before if iteration == self.trainer.global_step else self.present_intercept

    @property
    def present_intercept(self) -> float:
        """What it adds now."""
        return self.base_rate.intercept if self.reward.intercept == "base_rate" else 0.0

    @property
    def waiting(self) -> bool:
        """Whether too few right answers were seen yet for the PRM to learn."""
        return self.seen_right < self.reward.replay.wait_right

    def update_prm(self, batch: Batch, reference_BT: Tensor | None) -> Tensor | None:
        """`L_CE` (or another PRM loss) on the outcome labels: this iteration's lessons, then replayed ones.

        Returns the log-probs of the batch from before the update, where it has them and rewards are of them.
        """
        if self.prm is None or reference_BT is None or self.reward.update == "none":
            return None
        before, waited, prm_BT = self.reward.update == "before", self.waiting, None
        if before:
            self.second_look(batch, reference_BT)
        lessons = self.counted(self.lessons(batch, reference_BT))
        if not self.waiting:
            prm_BT = self.optimise_prm(*lessons.given, self.prm_loss, self.reward.beta, lessons.intercept_B)
            unread = prm_BT is None and self.prm_goes_first and not before  # there was nothing to learn in these
            if unread and len(self.replay):
                prm_BT = self.score(self.prm, batch)
            self.relearn(lessons.groups, self.reward.replay.first_passes if waited else self.reward.replay.passes)
        self.replay.add(lessons)
        if not before:
            self.second_look(batch, reference_BT)
        return None if before or prm_BT is None else prm_BT[: len(batch), : batch.mask_BT.shape[1]]

    def relearn(self, groups: int, passes: int) -> None:
        """Passes over replayed lessons, of so many groups where groups are drawn."""
        generator = self.generator("replay")
        for _ in range(passes):
            past = self.replay.draw(groups, generator, self.device)
            if past is None:
                return
            self.optimise_prm(*self.seen_again(past), self.prm_loss, self.reward.beta, past.intercept_B)
            age_BT = self.trainer.global_step - past.batch.version_BT
            self.measures.add("prm/replay_age", age_BT[past.batch.mask_BT].sum(), past.batch.mask_BT.sum())

    def seen_again(self, past: Lessons) -> tuple[Batch, Tensor]:
        """Replayed responses and what they are scored against."""
        if self.reward.replay.reference == "stored":
            return past.given
        return past.batch, self.score(self.policy, past.batch)

    def lessons(self, batch: Batch, reference_BT: Tensor) -> Lessons:
        """What this iteration has to teach: its accepted groups, and with `learn_from: all` the rejected ones."""
        rejected = batch.rejected if self.reward.learn_from == "all" else None
        told = self.gather((batch.groups, [] if rejected is None else rejected.numbers()))
        accepted, others = sum(groups for groups, _ in told), sorted(n for _, numbers in told for n in numbers)
        if rejected is not None and others:  # all ranks take part, those too that have none
            batch, reference_BT = self.joined(batch, reference_BT, rejected, others, accepted)
        none_B = torch.zeros_like(batch.outcome_B)
        groups = accepted + len(others)
        return Lessons(batch=batch, reference_logprobs_BT=reference_BT, intercept_B=none_B, groups=groups)

    def joined(
        self, batch: Batch, reference_BT: Tensor, rejected: Batch, numbers: list[int], first: int
    ) -> tuple[Batch, Tensor]:
        """Accepted and rejected rows with their reference; the n-th of `numbers` becomes `first + n`."""
        start_BT = rejected.behaviour_logprobs_BT if self.loss.proximal == "engine" else None
        other_BT = self.reference_logprobs(rejected, start_BT)
        assert other_BT is not None
        rejected = self.finite(rejected, other_BT)
        if rejected.groups == 0:
            return batch, reference_BT
        other = replace(renumbered(rejected, numbers, first), rollouts=[])
        return join([replace(batch, rollouts=[]), other], batch), padded_cat([reference_BT, other_BT])

    def counted(self, lessons: Lessons) -> Lessons:
        """Take in how many answers are right, where something depends on it; the lessons with their intercept."""
        if self.reward.intercept == "none" and not self.reward.replay.iterations:
            return lessons
        known_B = lessons.batch.valid_B
        sums = torch.stack([lessons.batch.outcome_B[known_B].sum(), known_B.sum()])
        right, count = self.all_reduce(sums, "sum").tolist()
        most = self.all_reduce(torch.tensor(lessons.megabytes), "max")
        self._labels = self.trainer.global_step, self.present_intercept
        self.base_rate.update(right, count)
        self.seen_right += right
        if self.reward.intercept != "none":
            self.measures.add("prm/intercept", self.present_intercept)
        return replace(lessons, intercept_B=lessons.intercept_B + self.present_intercept, most_megabytes=float(most))

    # ---- groups that train the policy by the process reward alone

    def with_process_only(self, batch: Batch) -> Batch:
        """The batch and, where process rewards count by now, the rejected groups that nothing else tells apart."""
        self.accepted, rejected, which = None, batch.rejected, self.reward.process_only
        if which == "none" or rejected is None or self.gate.weight == 0:
            return batch
        silent_B = alg.without_signal(rejected.outcome_B, rejected.group_B, rejected.valid_B, which)
        rows, others = (mask_B.cpu().nonzero().squeeze(-1) for mask_B in (silent_B, ~silent_B))
        mine = rejected.select(rows) if len(rows) else rejected.nothing()
        told = self.gather((batch.groups, mine.numbers()))
        numbers = sorted(number for _, found in told for number in found)
        self.measures.add("train/process_only", mine.groups, 0.0)
        if not numbers:
            return batch
        self.accepted = sum(groups for groups, _ in told)
        if not mine.groups:
            return batch
        rest = rejected.select(others) if len(others) else rejected.nothing()
        return replace(join([batch, renumbered(mine, numbers, self.accepted)], batch), rejected=rest)

    def with_signal(self, batch: Batch) -> Batch:
        """The same rows, of which those count that the filter accepted."""
        if self.accepted is None:
            return batch
        accepted_B = batch.group_B < self.accepted
        return replace(batch, valid_B=batch.valid_B & accepted_B, mask_BT=batch.mask_BT & accepted_B[:, None])

    def trusted(self, batch: Batch) -> Batch:
        """Without groups of a process reward alone, if the gate has closed since they joined."""
        return batch if self.gate.weight > 0 else self.with_signal(batch)

    def of_accepted(self, batch: Batch, outcome_BT: Tensor) -> Tensor:
        """Outcome credit of accepted groups only."""
        if self.accepted is None:
            return outcome_BT
        return torch.where((batch.group_B < self.accepted)[:, None], outcome_BT, 0.0)

    def shaped(self, batch: Batch) -> Tensor:
        """Outcome rewards as the policy earns them."""
        if self.shaping is None:
            return batch.outcome_B
        reward_B: Tensor = self.shaping(batch.outcome_B, batch.response_length_B)
        accepted_B = self.with_signal(batch).valid_B
        self.measures.add("train/shaping", (reward_B - batch.outcome_B)[accepted_B].sum(), accepted_B.sum())
        return reward_B

    def judge_prm(self, batch: Batch, reward_BT: Tensor) -> bool:
        """By accepted groups, whatever else is in the batch."""
        return super().judge_prm(self.with_signal(batch), reward_BT)

    def second_look(self, batch: Batch, reference_BT: Tensor) -> None:
        """By accepted groups, too."""
        super().second_look(self.with_signal(batch), reference_BT)

    def log_iteration(self, batch: Batch) -> dict[str, float]:
        """Responses are judged by accepted groups; the others are counted apart."""
        return super().log_iteration(self.with_signal(batch))


def renumbered(batch: Batch, numbers: list[int], first: int) -> Batch:
    """The same rows, whose group is `first` and on by its place among these numbers."""
    place_B = torch.searchsorted(torch.tensor(numbers, device=batch.group_B.device), batch.group_B)
    return replace(batch, group_B=first + place_B)
