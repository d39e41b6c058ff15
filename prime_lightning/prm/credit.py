"""Does a PRM blame the wrong steps? Measured where every step can be checked: on the embedded arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prime_lightning.algorithms import auc
from prime_lightning.arithmetic import Chains, step_truth
from prime_lightning.prm.implicit import ImplicitPRM
from prime_lightning.prm.steps import StepRule

STEPS = StepRule(rule="text", separator=";")


def step_auc(prm: ImplicitPRM, problems: Sequence[str], answers: Sequence[str], chains: Chains) -> dict[str, Any]:
    """Chance that a right step gets a greater reward than a wrong one, over all steps of all answers.

    A step is right if it follows from the result written before it, as `arithmetic.step_truth` says; the final result
    is no step. Its reward is the sum of its tokens' rewards (PRIME, arXiv 2502.01456, Eq. 3). A PRM that knows the
    outcome only, or nothing, comes to about 0.5.

    Args:
        prm: The PRM and its reference.
        problems: Chains, once an answer.
        answers: What was written.
        chains: The task.

    Returns:
        `auc` (None if all steps are right, or all wrong), `steps`, `wrong_steps` and `answers`.
    """
    rewards: list[float] = []
    truth: list[bool] = []
    for problem, answer, scored in zip(problems, answers, prm.score(problems, answers, steps=STEPS), strict=True):
        right = step_truth(problem, answer, chains)
        truth += right
        rewards += scored.step_rewards[: len(right)]
    right_N = torch.tensor(truth)
    value = float(auc(torch.tensor(rewards), right_N.float(), torch.ones_like(right_N)))
    return {
        "auc": value if 0 < right_N.sum() < len(right_N) else None,
        "steps": len(right_N),
        "wrong_steps": int((~right_N).sum()),
        "answers": len(answers),
    }
