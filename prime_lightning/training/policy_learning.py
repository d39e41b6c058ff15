"""How policy and critic of a `PrimeModule` learn, and from which groups beside those that the filter kept.

Shapes: B responses, T response tokens, b and t those of a micro-batch.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from prime_lightning import algorithms as alg
from prime_lightning.algorithms.credit import Silent
from prime_lightning.models.batch import Batch, join, renumbered
from prime_lightning.training.options import PolicyLoss
from prime_lightning.training.panel import Panel
from prime_lightning.training.stepping import Stepper


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
