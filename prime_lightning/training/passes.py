"""The log-probs that an iteration starts from, each by as few passes over the rollouts as its options allow.

docs/concepts.md has the table; `tests/training/test_passes.py` counts. Shapes: B responses, T response tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prime_lightning import algorithms as alg
from prime_lightning.models.batch import Batch
from prime_lightning.training.options import PolicyLoss, ProcessReward
from prime_lightning.training.stepping import SteppingModule

ENGINE_GAP = 0.1  # nats; bfloat16 engines come to about 0.01, engines with other weights to more than 1


class PassesModule(SteppingModule):
    """The side of `PrimeModule` that scores rollouts before anything learns from them."""

    policy: Any
    prm: Any
    reference: Any
    loss: PolicyLoss
    reward: ProcessReward
    engine_checked = False

    def proximal_logprobs(self, batch: Batch) -> Tensor | None:
        """`log pi_old`, what the clipped ratio starts from: by the trainer's policy, or what the engine said.

        None where the policy's own and only pass will give it: what nothing reads before costs no pass of its own.
        """
        engine, due = self.loss.proximal == "engine", self.comparison_is_due(batch)
        relative = self.reference is None or self.reward.against == "policy"
        as_reference = self.prm is not None and relative and batch.plain
        policy_BT = None
        if due or not (engine or self.loss.in_one_pass(self.updates["policy"], as_reference)):
            policy_BT = self.score(self.policy, batch, as_sampled=True)
        if due and policy_BT is not None:
            self.compare_with_engine(batch, policy_BT)
        return batch.behaviour_logprobs_BT if engine else policy_BT

    def reference_logprobs(self, batch: Batch, proximal_BT: Tensor | None) -> Tensor | None:
        """`log pi_ref`: of the frozen reference, or of the policy that sampled; at temperature 1 and without a mask.

        None where there is neither PRM nor reference, for nothing reads it then.
        """
        if self.reference is not None:
            return self.score(self.reference, batch)
        if self.prm is None or (batch.plain and proximal_BT is not None):
            return proximal_BT
        return self.score(self.policy, batch)

    def anchor_logprobs(self, batch: Batch, reference_BT: Tensor | None) -> Tensor | None:
        """`log pi_ref` at temperature and mask of the sampling, as the policy is: what its KL is taken to."""
        same = self.reference is None or batch.plain
        return reference_BT if same else self.score(self.reference, batch, as_sampled=True)

    def comparison_is_due(self, batch: Batch) -> bool:
        """Whether engine and policy were not compared yet, and a batch can tell: if all of it is on-policy."""
        if self.engine_checked:
            return False
        lag_BT = (self.trainer.global_step - batch.version_BT)[batch.mask_BT].abs()
        sums = torch.stack([batch.mask_BT.sum(), lag_BT.sum()]).float()
        tokens, lag = self.all_reduce(sums, "sum").tolist()
        return bool(tokens > 0 and lag == 0)

    def compare_with_engine(self, batch: Batch, policy_BT: Tensor) -> None:
        """Stop a run whose engine does not sample from the policy.

        Raises:
            ValueError: if engine and trainer differ by more than `ENGINE_GAP` nats a token.
        """
        mask_BT, _ = alg.drop_nonfinite(batch.mask_BT, batch.behaviour_logprobs_BT, policy_BT)
        abs_diff = alg.masked_sum((policy_BT - batch.behaviour_logprobs_BT).abs(), mask_BT)
        gap, tokens = self.all_reduce(torch.stack([abs_diff, mask_BT.sum()]), "sum").tolist()
        if tokens == 0:
            return
        self.engine_checked = True
        if gap / tokens > ENGINE_GAP + batch.truncation:
            raise ValueError(
                "Expected the engine's log-probs of the first batch to be the policy's, got a mean difference of "
                f"{gap / tokens:.3g} nats a token. The engine's weights, tokenizer, temperature or log-prob mode are "
                "not the trainer's."
            )

    @property
    def prm_goes_first(self) -> bool:
        """Whether the PRM is updated before its rewards are computed.

        Under `after`, too, where one step is all: its own forward has the log-probs from before it (single forward).
        """
        return self.reward.update == "before" or (self.reward.update == "after" and self.updates["prm"].one_step)
