"""The numbers of `PrimeModule`, grouped by what they belong to, and which of them go together.

Defaults are the paper's where it has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prime_lightning.algorithms.credit import Silent
from prime_lightning.algorithms.masked import Aggregation
from prime_lightning.algorithms.policy_loss import Beyond, Estimator, Surrogate, Unit, clipped_surrogate
from prime_lightning.algorithms.reward import Granularity, Normalisation
from prime_lightning.models.head import Entropy
from prime_lightning.models.options import Lora


@dataclass(frozen=True, kw_only=True)
class Replaying:
    """Past lessons of the PRM, kept and learned from again. Not in the paper."""

    iterations: int = 0
    """Past iterations that are kept; 0 is off."""
    passes: int = 1
    """Passes over replayed lessons that follow the one over this iteration's."""
    draw: Literal["iteration", "groups"] = "iteration"
    """What a pass goes over: one past iteration, or as many groups as this iteration has, of all that are kept."""
    reference: Literal["stored", "present"] = "stored"
    """Whose log-probs replayed responses are scored against: the reference of their own iteration, or the policy as it
    is now, for one forward without gradient a pass; the latter where `reference` is null."""
    megabytes: float = 4096.0
    """Most that is kept, in main memory, of the rank that has the most; the oldest are forgotten first."""
    wait_right: int = 0
    """Right answers that must have been seen before the PRM is trained at all; until then it only keeps lessons."""
    first_passes: int = 1
    """Replayed passes of the iteration that ends this wait, instead of `passes`."""

    def __post_init__(self) -> None:
        for name, least in (("iterations", 0), ("passes", 0), ("megabytes", 0), ("wait_right", 0), ("first_passes", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"Expected `process_reward.replay.{name}` of at least {least}, got {getattr(self, name)}."
                )
        if self.wait_right and not self.iterations:
            raise ValueError(
                "Expected `process_reward.replay.iterations` above 0 with `wait_right`, got 0: what comes while the "
                "PRM waits has to be kept."
            )


@dataclass(frozen=True, kw_only=True)
class ProcessReward:
    """The implicit process reward."""

    beta: float = 0.05
    """Of `beta * log(prm / reference)`; short responses want more, about 0.5."""
    granularity: Granularity = "token"
    """Reward each token, each step, or the response."""
    step_separator: str = "\n\n"
    """Text that ends a step; any token that contains it does."""
    normalise: Normalisation = "batch_max"
    """By what the reward is divided; over all ranks."""
    update: Literal["after", "before", "none"] = "after"
    """Train the PRM after its rewards are read (the paper's single forward), before (double forward), or not at all."""
    against: Literal["reference", "policy"] = "reference"
    """What the reward is paid against: the reference that the loss has, or the policy that sampled, so that a frozen
    reference is a fixed target for the loss and the reward fades as the policy comes to what the PRM knows."""
    learn_from: Literal["accepted", "all"] = "accepted"
    """Groups that the PRM learns from: those that the accuracy filter keeps, or all that are graded."""
    most_rejected: float = 4.0
    """With `learn_from: all`, at most so many rejected groups for each accepted one."""
    process_only: Silent = "none"
    """Rejected groups that train the policy by the process reward alone, once the gate lets it count: none, those
    without a right answer, or all whose outcomes are equal. They come on top of the batch; needs `learn_from: all`."""
    intercept: Literal["none", "base_rate"] = "none"
    """What is added to response rewards in the PRM's loss: nothing, or the log-odds of the share of right answers
    lately, so that the PRM need not make all tokens less likely where few answers are right."""
    replay: Replaying = Replaying()
    """Past lessons to learn from again."""
    second_look: int = 1
    """Iterations between two measurements of the PRM on the far side of its update, `prm/accuracy_after`; each costs
    one forward pass of the PRM; 0 is off."""

    def __post_init__(self) -> None:
        if self.second_look < 0:
            raise ValueError(f"Expected `process_reward.second_look` of 0 (off) or more, got {self.second_look}.")
        if self.process_only != "none" and self.learn_from != "all":
            raise ValueError(
                f"Expected `process_reward.learn_from: all` with `process_only: {self.process_only}`, got accepted."
            )
        if self.most_rejected < 0:
            raise ValueError(f"Expected `process_reward.most_rejected` of 0 or more, got {self.most_rejected}.")


@dataclass(frozen=True, kw_only=True)
class Credit:
    """How rewards become advantages."""

    gamma_outcome: float = 1.0
    """Discount of the outcome reward."""
    gamma_process: float = 1.0
    """Discount of the process reward."""
    outcome_weight: float = 1.0
    """Weight of the outcome's advantage."""
    process_weight: float = 1.0
    """Weight of the process reward's advantage, on top of the gate's."""
    process_per: Literal["token", "step"] = "token"
    """What is one action to the process reward: a token, or a step, each token of which then gets the credit of all of
    it; the latter with `gamma_process: 0`. Steps end as in `process_reward.step_separator`."""
    lam: float = 1.0
    """Lambda of GAE."""
    whiten: bool = False
    """Bring advantages to mean 0 and variance 1 over all tokens and ranks, as the released code does."""

    def __post_init__(self) -> None:
        if self.process_per == "step" and self.gamma_process != 0:
            raise ValueError(
                f"Expected `credit.gamma_process: 0` with `process_per: step`, got {self.gamma_process}: a return that "
                "goes on behind the step would be counted once for each of its tokens."
            )


@dataclass(frozen=True, kw_only=True)
class Update:
    """How one model is updated in one iteration."""

    minibatches: int = 4
    """Optimizer steps of one pass over the rollouts."""
    epochs: int = 1
    """Passes over the rollouts."""
    grad_clip: float = 1.0
    """Greatest norm of the gradient."""
    micro_tokens: int = 16_384
    """Tokens, padding counted, of one forward and backward."""

    @property
    def one_step(self) -> bool:
        """One optimizer step is all, so the pass before it sees all rollouts by the model as it was."""
        return self.minibatches == self.epochs == 1


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The policy's loss."""

    surrogate: Callable[..., Surrogate] = clipped_surrogate
    """What is minimised, see `algorithms.policy_loss`: PPO's clipped ratio, `gspo`, `cispo`, or your own."""
    clip_low: float = 0.2
    """The ratio counts down to 1 minus this."""
    clip_high: float = 0.2
    """The ratio counts up to 1 plus this."""
    aggregate: Aggregation = "token"
    """What weighs the same: each token, each response, or each token of every batch."""
    constant_length: int | None = None
    """Tokens that `aggregate: constant` divides by."""
    kl: Literal["none", "reward", "loss"] = "none"
    """Where a KL penalty to the reference enters; the paper has none."""
    kl_weight: float = 0.001
    """Weight of that penalty."""
    kl_estimator: Estimator = "k2"
    """Schulman's estimator; `k1` inside the reward, `k2` inside the loss."""
    entropy_weight: float = 0.0
    """Bonus on the entropy of the policy."""
    proximal: Literal["trainer", "engine"] = "trainer"
    """Whose log-probs the clipped ratio starts from: the trainer's policy, with a correction by `importance_cap`, for
    one forward pass more if there are several optimizer steps, or the engine's own, which makes the ratio the whole
    importance weight."""
    importance_cap: float | None = 2.0
    """Largest weight of the importance correction from engine to trainer; null is no correction."""
    importance_floor: float = 0.0
    """Smallest weight of it."""
    importance_per: Unit = "token"
    """What has one weight: a token by its own ratio, or a response by the product or the geometric mean of its
    tokens' ratios."""
    importance_beyond: Beyond = "truncate"
    """What becomes of a weight out of these bounds: it is brought to the bound, or to 0."""
    value_clip: float = 0.2
    """How far the critic's value may move in one iteration."""

    def __post_init__(self) -> None:
        if self.aggregate == "constant" and not self.constant_length:
            raise ValueError(
                "Expected `policy_loss.constant_length` with `aggregate: constant`, got none; "
                "take `${data.sampling.max_tokens}`."
            )
        cap = self.importance_cap
        if not 0 <= self.importance_floor < (math.inf if cap is None else cap):
            raise ValueError(
                "Expected `policy_loss.importance_floor` of 0 or more and below `importance_cap` "
                f"({cap}), got {self.importance_floor}."
            )

    @property
    def correction(self) -> dict[str, Any]:
        """The options of `algorithms.importance_weight`; that of 2 is measured where there is no correction."""
        return {
            "cap": self.importance_cap or 2.0,
            "floor": self.importance_floor,
            "per": self.importance_per,
            "beyond": self.importance_beyond,
        }

    @property
    def entropy(self) -> Entropy:
        """It is logged always, and a part of the graph only where the loss has it."""
        return "trained" if self.entropy_weight else "measured"

    def in_one_pass(self, update: Update, as_reference: bool) -> bool:
        """Whether the policy's update itself can give the log-probs that the ratio starts from.

        Args:
            update: Of the policy.
            as_reference: The PRM's reward is relative to these log-probs, so it waits for them.
        """
        return update.one_step and self.kl != "reward" and not as_reference


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A look at the engine after weights were sent: does it say greedily what the policy finds likeliest?"""

    every: int | None = 0
    """Iterations between two looks, besides the one at the start of `fit`; 0 is that one alone, null none at all."""
    prompts: int = 2
    """Training prompts that each rank asks its engine."""
    tokens: int = 32
    """Most tokens of an answer."""
    margin: float = 0.5
    """Nats by which the policy may find another token likelier: logits of 16 to 32 are 0.125 apart in bfloat16."""

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("every", self.every is None or self.every >= 0, "null, 0 or positive"),
            ("prompts", self.prompts >= 1, "at least 1"),
            ("tokens", self.tokens >= 1, "at least 1"),
            ("margin", self.margin >= 0, "0 or positive"),
        ):
            if not ok:
                raise ValueError(f"Expected `probe.{name}` {expected}, got {getattr(self, name)}.")

    def due(self, step: int, last: int | None) -> bool:
        """Whether to look after so many iterations, where the last look was after `last` of them."""
        if self.every is None or last is None:
            return self.every is not None
        return step != last and self.every > 0 and step % self.every == 0


def check_together(
    names: Mapping[str, str | None],
    adapters: Mapping[str, Lora | None],
    *,
    share_base: bool,
    loss: PolicyLoss,
    reward: ProcessReward,
    credit: Credit,
) -> None:
    """Refuse models and options that contradict each other.

    Args:
        names: Of the models by role; None where there is none.
        adapters: Of policy and PRM.
        share_base: Whether these two have their frozen weights in common.
        loss: Of the policy.
        reward: Of the PRM.
        credit: Weights of both rewards.

    Raises:
        ValueError: and what does not go together.
    """
    if loss.kl != "none" and names["reference"] is None:
        raise ValueError(f"Expected a `reference` model for the KL penalty (policy_loss.kl={loss.kl!r}), got none.")
    if reward.replay.reference == "present" and names["reference"] is not None:
        raise ValueError("Expected `reference: null` with `replay.reference: present`, got a reference model.")
    if names["critic"] is not None and reward.process_only != "none":
        raise ValueError(
            f"Expected no critic with process_reward.process_only={reward.process_only!r}, got one: it learns outcomes."
        )
    if names["critic"] is not None and credit.outcome_weight <= 0:
        raise ValueError(f"Expected `credit.outcome_weight` above 0 with a critic, got {credit.outcome_weight}.")
    if share_base:
        check_share_base(names, adapters)


def check_share_base(names: Mapping[str, str | None], adapters: Mapping[str, Lora | None]) -> None:
    """Refuse to share weights that are trained, or of two models.

    Args:
        names: Of the models by role.
        adapters: Of policy and PRM.

    Raises:
        ValueError: and what to set.
    """
    for role in ("policy", "prm"):
        if adapters[role] is None:
            raise ValueError(
                f"Expected adapters on policy and PRM with `share_base: true`, got no `model.{role}_lora`, so that all "
                f"weights of the {role} would be trained. Add --config conf/model/lora.yaml."
            )
    if names["prm"] != names["policy"]:
        raise ValueError(
            f"Expected one model below policy and PRM with `share_base: true`, got {names['policy']!r} and "
            f"{names['prm']!r}."
        )
