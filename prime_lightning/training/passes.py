"""The log-probs that an iteration starts from, each by as few passes over the rollouts as its options allow.

docs/concepts.md has the table; `tests/training/test_passes.py` counts. Shapes: B responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prime_lightning import algorithms as alg
from prime_lightning.models.batch import Batch
from prime_lightning.training.options import PolicyLoss, ProcessReward
from prime_lightning.training.stepping import Stepper

ENGINE_GAP = 0.1  # nats; bfloat16 engines come to about 0.01, engines with other weights to more than 1


class Passes:
    """Scores rollouts before anything learns from them.

    Args:
        stepper: Runs the models.
        names: Of the models by role; None where there is none.
        loss: Of the policy.
        reward: Of the PRM.
    """

    def __init__(
        self, stepper: Stepper, names: Mapping[str, str | None], loss: PolicyLoss, reward: ProcessReward
    ) -> None:
        self.stepper, self.loss, self.reward = stepper, loss, reward
        self.has_prm, self.has_reference = names["prm"] is not None, names["reference"] is not None
        self.engine_checked = False

    def proximal(self, batch: Batch) -> Tensor | None:
        """`log pi_old`, what the clipped ratio starts from: by the trainer's policy, or what the engine said.

        None where the policy's own and only pass will give it: what nothing reads before costs no pass of its own.
        """
        engine, due = self.loss.proximal == "engine", self.comparison_is_due(batch)
        relative = not self.has_reference or self.reward.against == "policy"
        as_reference = self.has_prm and relative and batch.plain
        policy_BT = None
        if due or not (engine or self.loss.in_one_pass(self.stepper.updates["policy"], as_reference)):
            policy_BT = self.stepper.score("policy", batch, as_sampled=True)
        if due and policy_BT is not None:
            self.compare_with_engine(batch, policy_BT)
        return batch.behaviour_logprobs_BT if engine else policy_BT

    def reference(self, batch: Batch, proximal_BT: Tensor | None) -> Tensor | None:
        """`log pi_ref`: of the frozen reference, or of the policy that sampled; at temperature 1 and without a mask.

        None where there is neither PRM nor reference, for nothing reads it then.
        """
        if self.has_reference:
            return self.stepper.score("reference", batch)
        if not self.has_prm or (batch.plain and proximal_BT is not None):
            return proximal_BT
        return self.stepper.score("policy", batch)

    def anchor(self, batch: Batch, reference_BT: Tensor | None) -> Tensor | None:
        """`log pi_ref` at temperature and mask of the sampling, as the policy is: what its KL is taken to.

        None without a frozen reference.
        """
        if not self.has_reference:
            return None
        return reference_BT if batch.plain else self.stepper.score("reference", batch, as_sampled=True)

    def prm(self, batch: Batch) -> Tensor | None:
        """`log pi_phi`: of the PRM as it is now; None without one."""
        return self.stepper.score("prm", batch) if self.has_prm else None

    def comparison_is_due(self, batch: Batch) -> bool:
        """Whether engine and policy were not compared yet, and a batch can tell: if all of it is on-policy."""
        if self.engine_checked:
            return False
        lag_BT = (self.stepper.iteration - batch.version_BT)[batch.mask_BT].abs()
        sums = torch.stack([batch.mask_BT.sum(), lag_BT.sum()]).float()
        tokens, lag = self.stepper.all_reduce(sums, "sum").tolist()
        return bool(tokens > 0 and lag == 0)

    def compare_with_engine(self, batch: Batch, policy_BT: Tensor) -> None:
        """Stop a run whose engine does not sample from the policy.

        Raises:
            ValueError: if engine and trainer differ by more than `ENGINE_GAP` nats a token.
        """
        mask_BT, _ = alg.drop_nonfinite(batch.mask_BT, batch.behaviour_logprobs_BT, policy_BT)
        abs_diff = alg.masked_sum((policy_BT - batch.behaviour_logprobs_BT).abs(), mask_BT)
        gap, tokens = self.stepper.all_reduce(torch.stack([abs_diff, mask_BT.sum()]), "sum").tolist()
        if tokens == 0:
            return
        self.engine_checked = True
        if gap / tokens > ENGINE_GAP + batch.truncation:
            raise ValueError(
                "Expected the engine's log-probs of the first batch to be the policy's, got a mean difference of "
                f"{gap / tokens:.3g} nats a token. The engine's weights, tokenizer, temperature or log-prob mode are "
                "not the trainer's."
            )
