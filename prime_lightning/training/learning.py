"""How the models of a `PrimeModule` learn: the PRM, the policy and the critic, and from which groups.

The PRM learns by default from the accepted rollouts of the iteration, once, as in PRIME, arXiv 2502.01456, Algorithm 1.
The other ways are ours; `docs/prm_learning.md` has their equations.

Shapes: B responses, T response tokens, b and t those of a micro-batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prime_lightning import algorithms as alg
from prime_lightning.algorithms.credit import Silent
from prime_lightning.models.batch import Batch, join, padded_cat, renumbered
from prime_lightning.training.options import PolicyLoss
from prime_lightning.training.panel import Panel
from prime_lightning.training.passes import Passes
from prime_lightning.training.replay import Lessons, Replay, share
from prime_lightning.training.stepping import SKIPS_IN_A_ROW, Stepper


class PRMLearner:
    """Trains the PRM.

    Args:
        passes: Score what the PRM is compared with; their reward says from what, how often and when it learns.
        panel: Measures the PRM on the far side of its update.
        loss: See `algorithms.prm_loss`.
        gate: Closed where the PRM cannot learn any more.
    """

    def __init__(self, passes: Passes, panel: Panel, loss: Callable[..., Any], gate: alg.ProcessGate) -> None:
        self.passes, self.panel, self.loss, self.gate = passes, panel, loss, gate
        self.stepper, self.reward, self.measures = passes.stepper, passes.reward, panel.measures
        self.replay, self.base_rate = Replay(self.reward.replay), alg.BaseRate()
        self.seen_right = 0.0  # right answers of all lessons so far, over all ranks
        self.intercept = 0.0  # what the PRM's loss added to response rewards before this iteration's labels

    @property
    def present_intercept(self) -> float:
        """What it adds now."""
        return self.base_rate.intercept if self.reward.intercept == "base_rate" else 0.0

    @property
    def waiting(self) -> bool:
        """Whether too few right answers were seen yet for the PRM to learn."""
        return self.seen_right < self.reward.replay.wait_right

    @property
    def goes_first(self) -> bool:
        """Whether the PRM is updated before its rewards are computed.

        Under `after`, too, where one step is all: its own forward has the log-probs from before it (single forward).
        """
        one_step = self.stepper.updates["prm"].one_step
        return self.reward.update == "before" or (self.reward.update == "after" and one_step)

    def before_reward(self, batch: Batch, reference_BT: Tensor | None) -> Tensor | None:
        """The PRM's log-probs that its rewards are of, once it has learned if it `goes_first`; None without a PRM."""
        self.intercept = self.present_intercept
        prm_BT = self.update(batch, reference_BT) if self.goes_first else None
        return self.passes.prm(batch) if prm_BT is None else prm_BT

    def after_reward(self, batch: Batch, reference_BT: Tensor | None) -> None:
        """Learn, if that is not done yet."""
        if not self.goes_first:
            self.update(batch, reference_BT)

    def update(self, batch: Batch, reference_BT: Tensor | None) -> Tensor | None:
        """The PRM's loss on the outcome labels: this iteration's lessons, then replayed ones.

        Returns the log-probs of the batch from before the update, where it has them and rewards are of them.
        """
        if not self.passes.has_prm or reference_BT is None or self.reward.update == "none":
            return None
        before, waited, prm_BT = self.reward.update == "before", self.waiting, None
        if before:
            self.second_look(batch, reference_BT)
        lessons = self.counted(self.lessons(batch, reference_BT))
        if not self.waiting:
            prm_BT = self.optimise(lessons)
            if prm_BT is None and self.goes_first and not before:  # nothing to learn in these; in replayed ones, maybe
                prm_BT = self.stepper.score("prm", batch)
            self.relearn(lessons.groups, self.reward.replay.first_passes if waited else self.reward.replay.passes)
        self.replay.add(lessons)
        if not before:
            self.second_look(batch, reference_BT)
        return None if before or prm_BT is None else prm_BT[: len(batch), : batch.mask_BT.shape[1]]

    def optimise(self, lessons: Lessons) -> Tensor | None:
        """One update, see `optimise_prm`."""
        given = lessons.batch, lessons.reference_logprobs_BT, self.loss, self.reward.beta, lessons.intercept_B
        return optimise_prm(self.stepper, *given, self.give_up)

    def give_up(self, role: str) -> None:
        """A PRM whose gradients stay broken does not end the run, which goes on by outcomes."""
        if not self.gate.closed and self.stepper.module.trainer.is_global_zero:
            warnings.warn(
                f"The PRM's gradient was not finite {SKIPS_IN_A_ROW} times in a row, at iteration "
                f"{self.stepper.iteration}: its reward is off from now on. Lower its learning rate.",
                stacklevel=2,
            )
        self.gate.close()

    def second_look(self, batch: Batch, reference_BT: Tensor) -> None:
        """Measure the PRM on the other side of its update, too; its rewards there are not used."""
        every = self.reward.second_look
        if not every or self.stepper.iteration % every:
            return
        batch, when = batch.of_accepted(), "_after" if self.reward.update == "after" else "_before"
        prm_BT = self.stepper.score("prm", batch)
        reward_BT = alg.process_reward(prm_BT, reference_BT, batch.mask_BT, beta=self.reward.beta)
        self.panel.measure_prm(batch, reward_BT.sum(1), self.intercept, when)

    def relearn(self, groups: int, passes: int) -> None:
        """Passes over replayed lessons, of so many groups where groups are drawn."""
        generator = self.stepper.generator("replay")
        for _ in range(passes):
            past = self.replay.draw(groups, generator, self.stepper.module.device)
            if past is None:
                return
            if self.reward.replay.reference == "present":
                past = replace(past, reference_logprobs_BT=self.stepper.score("policy", past.batch))
            self.optimise(past)
            age_BT = self.stepper.iteration - past.batch.version_BT
            self.measures.add("prm/replay_age", age_BT[past.batch.mask_BT].sum(), past.batch.mask_BT.sum())

    def lessons(self, batch: Batch, reference_BT: Tensor) -> Lessons:
        """What this iteration has to teach: its accepted groups, and with `learn_from: all` the rejected ones."""
        rejected = batch.rejected if self.reward.learn_from == "all" else None
        told = self.stepper.gather((batch.groups, [] if rejected is None else rejected.numbers()))
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
        start_BT = rejected.behaviour_logprobs_BT if self.passes.loss.proximal == "engine" else None
        other_BT = self.passes.reference(rejected, start_BT)
        assert other_BT is not None
        rejected = self.panel.finite(rejected, other_BT)
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
        right, count = self.stepper.all_reduce(sums, "sum").tolist()
        most = self.stepper.all_reduce(torch.tensor(lessons.megabytes), "max")
        self.base_rate.update(right, count)
        self.seen_right += right
        if self.reward.intercept != "none":
            self.measures.add("prm/intercept", self.present_intercept)
        return replace(lessons, intercept_B=lessons.intercept_B + self.present_intercept, most_megabytes=float(most))

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks; past lessons are in `replay`."""
        return {"rate": self.base_rate.state_dict(), "seen_right": self.seen_right}

    def load_state_dict(self, state: dict[str, Any], of_ranks: list[Any]) -> None:
        """Take up that state, and the past lessons of all ranks."""
        self.base_rate.load_state_dict(state.get("rate", {"rate": None}))
        self.seen_right = state.get("seen_right", 0.0)
        trainer = self.stepper.module.trainer
        self.replay.load_state_dict(share(of_ranks, trainer.global_rank, trainer.world_size))


def optimise_prm(
    stepper: Stepper,
    batch: Batch,
    reference_BT: Tensor,
    loss: Callable[..., Any],
    beta: float,
    intercept_B: Tensor | None = None,
    give_up: Callable[[str], None] | None = None,
) -> Tensor | None:
    """Train the PRM on the outcomes: `loss` of `r = beta * sum_t log(prm / reference)`, PRIME's Eq. 3.

    Args:
        stepper: With a model `prm`.
        batch: Responses with outcomes.
        reference_BT: `log pi_ref` of their tokens.
        loss: See `algorithms.prm_loss`.
        beta: Reward per nat.
        intercept_B: Added to `r`, see `algorithms.BaseRate`.
        give_up: See `Stepper.optimise`.

    Returns:
        Its log-probs `[B, T]` under the mask as they were before; None unless one step over all responses was all.
    """
    labels = batch.outcome_B, batch.group_B, batch.valid_B
    seen_BT = torch.zeros_like(batch.behaviour_logprobs_BT)

    def terms(micro: Batch, rows: Tensor) -> Tensor:
        prm_bt, _ = stepper.logprobs("prm", micro)
        t = prm_bt.shape[1]
        seen_BT[rows, :t] = torch.where(micro.mask_BT, prm_bt.detach(), seen_BT[rows, :t])  # no row that only pads
        reference_bt = reference_BT[rows, :t]
        reward_bt = alg.process_reward(prm_bt, reference_bt, micro.mask_BT, beta=beta)
        logit_b = reward_bt.sum(1) if intercept_B is None else reward_bt.sum(1) + intercept_B[rows]
        total, count = loss(logit_b, micro.outcome_B, micro.group_B, micro.valid_B)
        stepper.measures.add("prm/loss", total, count)
        return total  # type: ignore[no-any-return]

    def count(rows: Tensor) -> Tensor:
        nothing = torch.zeros(len(rows), device=stepper.module.device)
        return loss(nothing, *(x[rows] for x in labels))[1]  # type: ignore[no-any-return]

    whole_groups = getattr(loss, "whole_groups", True)
    learned = stepper.optimise("prm", batch, terms, count, whole_groups=whole_groups, give_up=give_up)
    return seen_BT if learned and stepper.updates["prm"].one_step else None


class PolicyLearner:
    """Trains policy and critic.

    Args:
        stepper: Runs and updates them.
        panel: Measures the policy before it moves.
        loss: Of both.
    """

    def __init__(self, stepper: Stepper, panel: Panel, loss: PolicyLoss) -> None:
        self.stepper, self.panel, self.loss, self.measures = stepper, panel, loss, stepper.measures

    def update(self, batch: Batch, advantage_BT: Tensor, proximal_BT: Tensor | None, anchor_BT: Tensor | None) -> None:
        """Eq. 6, the clipped surrogate or another, with the optional KL, entropy and importance terms.

        Without `proximal_BT` the policy's log-probs of this very pass stand for it: `exp(logp - logp.detach())`.
        """
        options, panel = self.loss, self.panel
        weight_BT = None if proximal_BT is None else panel.measure_policy(batch, proximal_BT, anchor_BT)

        def terms(micro: Batch, rows: Tensor) -> Tensor:
            policy_bt, entropy_bt = self.stepper.logprobs("policy", micro, options.entropy, as_sampled=True)
            assert entropy_bt is not None
            t = micro.mask_BT.shape[1]
            proximal_bt, anchor_bt, weight_bt = (
                None if x_BT is None else x_BT[rows, :t] for x_BT in (proximal_BT, anchor_BT, weight_BT)
            )
            if proximal_bt is None:
                micro, proximal_bt = panel.finite(micro, policy_bt), policy_bt.detach()
                weight_bt = panel.measure_policy(micro, proximal_bt, anchor_bt)
            mask_bt = micro.mask_BT
            total, measured = options.surrogate(
                policy_bt,
                proximal_bt,
                advantage_BT[rows, :t],
                mask_bt,
                clip_low=options.clip_low,
                clip_high=options.clip_high,
                weight_BT=None if options.importance_cap is None else weight_bt,
                aggregate=options.aggregate,
                constant_length=options.constant_length,
            )
            extras = [-options.entropy_weight * entropy_bt] if options.entropy_weight else []
            if options.kl == "loss" and anchor_bt is not None:
                extras.append(options.kl_weight * alg.kl(policy_bt, anchor_bt, options.kl_estimator))
            for extra_bt in extras:
                total = total + alg.aggregate(extra_bt, mask_bt, options.aggregate, options.constant_length)
            self.measures.add("policy/loss", total, alg.denominator(mask_bt, options.aggregate))
            self.measures.add("policy/entropy", alg.masked_sum(entropy_bt.detach(), mask_bt), mask_bt.sum())
            self.measures.add_all(measured, mask_bt.sum())
            return total

        def count(rows: Tensor) -> Tensor:
            return alg.denominator(batch.mask_BT[rows], options.aggregate)

        self.stepper.optimise("policy", batch, terms, count)

    def update_critic(self, batch: Batch, values_BT: Tensor | None, advantage_BT: Tensor) -> None:
        """The critic's clipped regression towards the returns of GAE."""
        if values_BT is None:
            return
        returns_BT = alg.gae_returns(advantage_BT, values_BT, batch.mask_BT)

        def terms(micro: Batch, rows: Tensor) -> Tensor:
            mask_bt, t = micro.mask_BT, micro.mask_BT.shape[1]
            new_bt, _ = self.stepper.logprobs("critic", micro)
            total, measured = alg.value_loss(
                new_bt, values_BT[rows, :t], returns_BT[rows, :t], mask_bt, clip=self.loss.value_clip
            )
            self.measures.add_all(measured, mask_bt.sum())
            return total

        self.stepper.optimise("critic", batch, terms, lambda rows: batch.mask_BT[rows].sum())


def with_process_only(batch: Batch, which: Silent, gate: alg.ProcessGate, stepper: Stepper) -> Batch:
    """The batch and, where process rewards count by now, the rejected groups that outcomes do not tell apart.

    Args:
        batch: Of this rank.
        which: See `ProcessReward.process_only`.
        gate: Of the process reward.
        stepper: Has the other ranks.
    """
    rejected = batch.rejected
    if which == "none" or rejected is None or gate.weight == 0:
        return batch
    silent_B = alg.without_signal(rejected.outcome_B, rejected.group_B, rejected.valid_B, which)
    rows, others = (mask_B.cpu().nonzero().squeeze(-1) for mask_B in (silent_B, ~silent_B))
    mine = rejected.select(rows) if len(rows) else rejected.nothing()
    told = stepper.gather((batch.groups, mine.numbers()))
    numbers, accepted = sorted(number for _, found in told for number in found), sum(groups for groups, _ in told)
    stepper.measures.add("train/process_only", mine.groups, 0.0)
    batch = replace(batch, accepted=accepted if numbers else None)
    if not mine.groups:
        return batch
    rest = rejected.select(others) if len(others) else rejected.nothing()
    return replace(join([batch, renumbered(mine, numbers, accepted)], batch), rejected=rest)
