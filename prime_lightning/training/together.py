"""Which models and options of a `PrimeModule` go together, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from prime_lightning.models.options import Lora
from prime_lightning.training.options import Credit, PolicyLoss, ProcessReward


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
