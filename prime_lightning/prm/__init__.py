"""The implicit PRM as a product: train it offline, save it, score with it, re-rank with it, evaluate it."""

from prime_lightning.models.steps import StepRule
from prime_lightning.prm.implicit import ImplicitPRM, Scored

__all__ = ["ImplicitPRM", "Scored", "StepRule"]
