"""The health panel: what one iteration says of the PRM and of the responses, beside what its losses measure.

`docs/metrics.md` explains each name; the formulas stand in `algorithms/measures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prime_lightning import algorithms as alg
from prime_lightning.algorithms.measures import Measures
from prime_lightning.models.batch import Batch
from prime_lightning.training.options import PolicyLoss
from prime_lightning.training.stepping import Stepper


@dataclass(frozen=True)
class Iteration:
    """One iteration on one rank, once it is over. Callbacks get it as `outputs["iteration"]`.

    Shapes: B responses, T response tokens.
    """

    number: int
    """Iterations before it, which is the version of the policy that was trained."""
    batch: Batch
    """What was trained on; the mask is without tokens whose log-probs were not finite."""
    process_BT: Tensor | None
    """Normalised process rewards, not weighted; None without a PRM, or of one whose numbers were not finite."""
    advantage_BT: Tensor
    """What the policy was trained with."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All that was measured, over all ranks, by the names of docs/metrics.md."""


class Panel:
    """Measures and judges.

    Args:
        stepper: Has the measures, and the other ranks.
        loss: Of the policy.
    """

    def __init__(self, stepper: Stepper, loss: PolicyLoss) -> None:
        self.stepper, self.measures, self.loss = stepper, stepper.measures, loss

    def finite(self, batch: Batch, *logprobs_BT: Tensor | None) -> Batch:
        """The batch without tokens whose log-probs are not finite, which are counted."""
        known = [one_BT for one_BT in (batch.behaviour_logprobs_BT, *logprobs_BT) if one_BT is not None]
        mask_BT, dropped = alg.drop_nonfinite(batch.mask_BT, *known)
        self.measures.add("policy/nonfinite_tokens", dropped, 0.0)
        return replace(batch, mask_BT=mask_BT)

    def measure_policy(self, batch: Batch, proximal_BT: Tensor, anchor_BT: Tensor | None) -> Tensor:
        """How far the policy is from the engine and from the reference; returns the weights that correct the first."""
        behaviour_BT = batch.behaviour_logprobs_BT
        corrected_BT, measured = alg.importance_weight(proximal_BT, behaviour_BT, batch.mask_BT, **self.loss.correction)
        self.measures.add_all(measured, batch.mask_BT.sum())
        if anchor_BT is not None:
            kl_BT = alg.kl(proximal_BT, anchor_BT, "k3")
            self.measures.add("policy/reference_kl", alg.masked_sum(kl_BT, batch.mask_BT), batch.mask_BT.sum())
        return corrected_BT

    def judge_prm(self, batch: Batch, reward_BT: Tensor, intercept: float) -> tuple[float, float | None]:
        """Measure how well the PRM's rewards tell right from wrong.

        Returns:
            Over all ranks, cross entropy, NaN where a reward is not finite; and pairwise accuracy, None without pairs.
        """
        broken = (~reward_BT.isfinite()).sum()
        self.measures.add("prm/nonfinite_tokens", broken, 0.0)
        sums = torch.cat([self.measure_prm(batch, reward_BT.sum(1), intercept), broken.double()[None]])
        self.measures.update(judge_rewards(reward_BT, batch, self.stepper.gather, intercept))
        ce_sum, ce_count, hits, pairs, broken_tokens = self.stepper.all_reduce(sums, "sum").tolist()
        ce = ce_sum / max(ce_count, 1) if broken_tokens == 0 else math.nan
        return ce, hits / pairs if pairs else None

    def measure_prm(self, batch: Batch, reward_B: Tensor, intercept: float, when: str = "") -> Tensor:
        """Cross entropy and pairwise accuracy; returns their sums and counts on this rank."""
        ce = alg.ce(reward_B + intercept, batch.outcome_B, batch.group_B, batch.valid_B)
        self.measures.add(f"prm/ce{when}", *ce)
        return torch.stack([*ce, *self.measure_pairs(f"prm/accuracy{when}", batch, reward_B)]).double()

    def measure_pairs(self, name: str, batch: Batch, reward_B: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of one group that rewards order as the verifier does; returns them and all pairs, of this rank."""
        pairs = alg.pairwise_accuracy(reward_B, batch.outcome_B, batch.group_B, batch.valid_B)
        self.measures.add(name, *pairs)
        return pairs

    def numbers(self, iteration: Iteration) -> dict[str, float]:
        """All that was measured in an iteration, the same on all ranks; the next one begins anew."""
        self.measures.update(judge_responses(iteration.batch.of_accepted(), iteration.number))
        self.measures.update(iteration.batch.metrics)
        numbers = self.measures.means(self.stepper.all_reduce, self.stepper.gather)
        self.measures.clear()
        return numbers | self.stepper.learning_rates()


def judge_rewards(
    reward_BT: Tensor, batch: Batch, gather: Callable[[Any], list[Any]], intercept: float = 0.0
) -> Measures:
    """How well raw process rewards tell right from wrong, and what else they pay for; over all ranks.

    Args:
        reward_BT: `beta * log(prm / reference)`, before it is normalised.
        batch: Of this rank.
        gather: Gives what each rank has; AUC, calibration and correlations are no sums over ranks.
        intercept: What makes log-odds of response rewards.
    """
    measures = Measures()
    judged = reward_BT.sum(1), batch.outcome_B, batch.response_length_B, batch.valid_B
    parts = gather(torch.stack([x.detach().double().cpu() for x in judged]))
    reward_B, outcome_B, length_B, known_B = torch.cat(parts, dim=1)
    valid_B = known_B > 0
    measures.add("prm/reward", reward_B[valid_B].sum(), valid_B.sum())
    for name, figure in (
        ("prm/auc", alg.auc(reward_B, outcome_B, valid_B)),
        ("prm/calibration_error", alg.calibration_error(reward_B + intercept, outcome_B, valid_B)),
        ("prm/outcome_correlation", alg.correlation(reward_B, outcome_B, valid_B)),
        ("prm/length_correlation", alg.correlation(reward_B, length_B, valid_B)),
    ):
        if figure.isfinite():  # NaN is "no answer", such as an AUC where all are right: nothing is logged
            measures.add(name, figure)
    measures.add("prm/last_token_share", *alg.last_token_share(reward_BT, batch.mask_BT))
    return measures


def judge_responses(batch: Batch, version: int) -> Measures:
    """Age, outcome and soundness of the responses that are trained on.

    Args:
        batch: Of this rank.
        version: Of the policy that was trained on them.
    """
    measures, tokens = Measures(), batch.mask_BT.sum()
    lag_BT = torch.where(batch.mask_BT, version - batch.version_BT, 0)
    oldest = lag_BT.amax() if lag_BT.numel() else lag_BT.sum()
    measures.add_all({"rollout/policy_lag": lag_BT.sum(), "rollout/policy_lag_max": oldest}, tokens)
    measures.add("train/outcome", batch.outcome_B[batch.valid_B].sum(), batch.valid_B.sum())
    measures.add("train/repetition", *alg.repetition(batch.response_tokens(), batch.mask_BT))
    return measures
