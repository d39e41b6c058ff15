"""The health panel: what one iteration says of the PRM and of the responses, beside what its losses measure.

`docs/metrics.md` explains each name; the formulas stand in `algorithms/health.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prime_lightning import algorithms as alg
from prime_lightning.algorithms.measures import Measures
from prime_lightning.models.batch import Batch
from prime_lightning.training.options import PolicyLoss, ProcessReward
from prime_lightning.training.stepping import SKIPS_IN_A_ROW, SteppingModule


class PanelModule(SteppingModule):
    """The side of `PrimeModule` that measures and logs."""

    prm: Any
    reference: Any
    reward: ProcessReward
    loss: PolicyLoss
    gate: alg.ProcessGate

    @property
    def intercept(self) -> float:
        """What the PRM's loss adds to response rewards."""
        return 0.0

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
        if self.reference is not None and anchor_BT is not None:
            kl_BT = alg.kl(proximal_BT, anchor_BT, "k3")
            self.measures.add("policy/reference_kl", alg.masked_sum(kl_BT, batch.mask_BT), batch.mask_BT.sum())
        return corrected_BT

    def judge_prm(self, batch: Batch, reward_BT: Tensor) -> bool:
        """Measure how well the PRM's rewards tell right from wrong, tell the gate, and say if all ranks' are finite."""
        broken = (~reward_BT.isfinite()).sum()
        self.measures.add("prm/nonfinite_tokens", broken, 0.0)
        sums = torch.cat([self.measure_prm(batch, reward_BT.sum(1)), broken.double()[None]])
        self.measures.update(judge_rewards(reward_BT, batch, self.gather, self.intercept))
        ce_sum, ce_count, hits, pair_count, broken_tokens = self.all_reduce(sums, "sum").tolist()
        ce = ce_sum / max(ce_count, 1) if broken_tokens == 0 else math.nan
        self.gate.update(ce, hits / pair_count if pair_count else None)
        for name in ("weight", "ce", "accuracy"):
            if getattr(self.gate, name) is not None:
                self.measures.add(f"gate/{name}", getattr(self.gate, name))
        return bool(broken_tokens == 0)

    def give_up(self, role: str) -> None:
        """A PRM whose gradients stay broken does not end the run, which goes on by outcomes."""
        if role != "prm":
            super().give_up(role)
        if not self.gate.closed and self.trainer.is_global_zero:
            warnings.warn(
                f"The PRM's gradient was not finite {SKIPS_IN_A_ROW} times in a row, at iteration "
                f"{self.trainer.global_step}: its reward is off from now on. Lower its learning rate.",
                stacklevel=2,
            )
        self.gate.close()

    def second_look(self, batch: Batch, reference_BT: Tensor) -> None:
        """Measure the PRM on the other side of its update, too; its rewards there are not used."""
        every = self.reward.second_look
        if every and self.trainer.global_step % every == 0:
            reward_BT = alg.process_reward(
                self.score(self.prm, batch), reference_BT, batch.mask_BT, beta=self.reward.beta
            )
            self.measure_prm(batch, reward_BT.sum(1), "_after" if self.reward.update == "after" else "_before")

    def measure_prm(self, batch: Batch, reward_B: Tensor, when: str = "") -> Tensor:
        """Cross entropy and pairwise accuracy; returns their sums and counts on this rank."""
        labels = batch.outcome_B, batch.group_B, batch.valid_B
        ce, pairs = alg.ce(reward_B + self.intercept, *labels), alg.pairwise_accuracy(reward_B, *labels)
        self.measures.add(f"prm/ce{when}", *ce)
        self.measures.add(f"prm/accuracy{when}", *pairs)
        return torch.stack([*ce, *pairs]).double()

    def log_iteration(self, batch: Batch) -> dict[str, float]:
        """One line of numbers an iteration, the same on all ranks."""
        self.measures.update(judge_responses(batch, self.trainer.global_step - 1))
        self.measures.update(batch.metrics)
        numbers = self.measures.means(self.all_reduce, lambda names: set().union(*self.gather(names)))
        numbers |= {f"{role}/lr": self.optimizer_of[role].param_groups[0]["lr"] for role in self.trained}
        for logger in self.loggers:  # not by `self.log`, which repeats old values of names that come and go
            logger.log_metrics(numbers, step=self.trainer.global_step - 1)
        self.log_dict(numbers, logger=False, batch_size=len(batch))
        return numbers


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
