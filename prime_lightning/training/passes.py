"""The log-probs that an iteration starts from, and whether the engine samples from the policy that they are of.

Each is had by as few passes over the rollouts as its options allow: docs/concepts.md has the table, and
`tests/training/test_passes.py` counts. The engine's log-probs are compared at the first batch, in their mean over many
tokens. A greedy probe looks earlier and more sharply, token for token: an engine that takes a token which the policy
finds much less likely than another has other weights, or computes another model.

Shapes: B responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from prime_lightning import algorithms as alg
from prime_lightning.engines.host_group import rank, together
from prime_lightning.models.batch import Batch
from prime_lightning.rollout import Completion, Prompt, Rollout, Verdict
from prime_lightning.training.options import PolicyLoss, Probe, ProcessReward
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


Answers = list[tuple[Prompt, Completion]]


@runtime_checkable
class GreedyData(Protocol):
    """A data module whose engine can be asked; others are not probed."""

    def greedy(self, prompts: int, tokens: int) -> Answers:
        """Greedy answers of at most so many tokens to so many prompts."""
        ...


def check_greedy(stepper: Stepper, data: Any, probe: Probe) -> Tensor:
    """Compare engine and policy; all ranks together, each with its own engine.

    Returns:
        Nats by which the policy finds another token likelier than the one that the engine took, for each token of all
        answers; empty for a data module that cannot be asked.

    Raises:
        ValueError: on all ranks, where one of them finds more than `probe.margin`.
    """
    if not isinstance(data, GreedyData):
        return torch.zeros(0)
    answers = together(lambda: data.greedy(probe.prompts, probe.tokens))[rank()]
    if not answers:  # on all ranks, which asked the same prompts
        return torch.zeros(0)
    logprobs_BT, likeliest_BT = teacher_forced(stepper, answers)
    together(lambda: judge(answers, logprobs_BT, likeliest_BT, probe.margin))
    return torch.cat([(likeliest_BT - logprobs_BT)[i, : len(done.token_ids)] for i, (_, done) in enumerate(answers)])


def teacher_forced(stepper: Stepper, answers: Answers) -> tuple[Tensor, Tensor]:
    """Log-probs `[B, T]` of the answers' tokens and of the likeliest ones, by one forward pass of the policy."""
    unknown = Verdict.unknown("nobody asked")
    batch = Batch.of_groups([[Rollout(prompt=prompt, completion=done, verdict=unknown)] for prompt, done in answers])
    module = stepper.module
    with torch.no_grad(), isolate_rng(), module.trainer.precision_plugin.forward_context():
        logprobs_BT, likeliest_BT = stepper.logprobs("policy", batch.to(module.device), entropy="likeliest")
    assert likeliest_BT is not None
    return logprobs_BT.cpu(), likeliest_BT.cpu()


def judge(answers: Answers, logprobs_BT: Tensor, likeliest_BT: Tensor, margin: float) -> None:
    """See that no token of an engine is much less likely to the policy than another.

    Raises:
        ValueError: with the first one that is.

    Example:
        >>> prompt = Prompt(draw=0, token_ids=(5,), text="1+1=", kind="exact")
        >>> done = Completion(text="3", token_ids=[7], logprobs=[-0.1], finish="stop", versions=[0])
        >>> judge([(prompt, done)], torch.tensor([[-9.0]]), torch.tensor([[-0.2]]), margin=0.5)
        Traceback (most recent call last):
        ValueError: Expected the engine, asked greedily, to take the policy's likeliest tokens, got another one ...
    """
    for (prompt, done), logprobs_T, likeliest_T in zip(answers, logprobs_BT, likeliest_BT, strict=True):
        for place, token in enumerate(done.token_ids):
            own, best = float(logprobs_T[place]), float(likeliest_T[place])
            if best - own <= margin:
                continue
            raise ValueError(
                f"Expected the engine, asked greedily, to take the policy's likeliest tokens, got another one as token "
                f"{place} of the answer {done.text[:40]!r} to the prompt {prompt.text[-40:]!r}: {token}, to which the "
                f"policy gives {own:.3g} nats and {best:.3g} to its likeliest (the engine says "
                f"{done.logprobs[place]:.3g}). Either weights did not arrive (try `transfer: host`), or the engine "
                "computes another model than `model.policy`: a quantised one, other rotary or attention settings, "
                "adapters left out. `model.probe.margin` is what is allowed, `model.probe.every: null` does not look."
            )
