"""Does a PRM blame the wrong steps? Measured where every step can be checked: on the embedded arithmetic.

A step is right if it follows from the result written before it (`arithmetic.step_truth`); the final result is no step.
Its reward is the sum of its tokens' (PRIME, arXiv 2502.01456, Eq. 3), against the reference that the PRM was trained
with. Against the model that the run started from, any policy that has improved would do as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prime_lightning.algorithms import auc
from prime_lightning.engines.hf import HFEngine
from prime_lightning.models.steps import StepRule, steps_of_tokens
from prime_lightning.prm.implicit import ImplicitPRM
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, Chains, step_truth
from prime_lightning.rollout import Sampling
from prime_lightning.rollout.files import read_rows

STEPS = StepRule(rule="text", separator=";")


def step_auc(rewards: Sequence[Sequence[float]], truths: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Chance that a right step has a greater reward than a wrong one, over all steps of all answers; a tie is half.

    Args:
        rewards: Of the steps of each answer.
        truths: Whether each step is right; steps behind the last one that can be judged are left out.

    Returns:
        `auc` (None if all steps are right, or all wrong), `steps` and `wrong_steps`.

    Example:
        >>> step_auc([[0.5, -0.5], [0.0, 0.2]], [[True, False], [True]])
        {'auc': 1.0, 'steps': 3, 'wrong_steps': 1}
    """
    pairs = [pair for r, t in zip(rewards, truths, strict=True) for pair in zip(r, t, strict=False)]
    reward_N, right_N = torch.tensor([r for r, _ in pairs]), torch.tensor([t for _, t in pairs], dtype=torch.bool)
    wrong = int((~right_N).sum())
    value = float(auc(reward_N, right_N.float(), torch.ones_like(right_N)))
    return {"auc": value if 0 < wrong < len(pairs) else None, "steps": len(pairs), "wrong_steps": wrong}


def online(rollouts: Path, chains: Chains) -> dict[str, Any]:
    """Step AUC of a run's own process rewards, from its `rollouts.jsonl`.

    These are the rewards that the policy was trained with: each problem is new, and was scored before the PRM saw its
    label. They were normalised an iteration at a time; all are pooled here.
    """
    rewards, truths = [], []
    for _, row in read_rows(rollouts):
        starts, place = [], 0
        for token in row["tokens"]:
            starts.append(place)
            place += len(token)
        spans = STEPS.spans(row["completion"])
        totals = [0.0] * len(spans)
        for step, reward in zip(steps_of_tokens(starts, spans), row["process_reward"], strict=True):
            totals[step] += reward
        rewards.append(totals)
        truths.append(step_truth(row["prompt"], row["completion"], chains))
    return step_auc(rewards, truths)


def held_out(
    prm: ImplicitPRM, writer: str, *, problems: int = 500, seed: int = 777_777, operations: int = 10
) -> dict[str, Any]:
    """Step AUC on answers to problems that were never trained on, written by a model at temperature 1.

    Args:
        prm: The PRM with its reference.
        writer: Hub id or folder of the model that answers.
        problems: How many problems, one answer each.
        seed: Of the problems.
        operations: Length of a problem.
    """
    prompts = ArithmeticPrompts(seed=seed, operations=operations)
    engine = HFEngine()
    engine.start(writer)
    asked = [prompts.prompt(draw, engine.tokenizer) for draw in range(problems)]
    sampling = Sampling(samples=1, max_tokens=2 * operations + 4)
    answered = [(prompt.text, done[0]) for prompt, done in engine.stream(asked, sampling) if done[0].text.strip()]
    scored = prm.score(
        [text for text, _ in answered],
        [done.text for _, done in answered],
        steps=STEPS,
        finished=[not done.truncated for _, done in answered],
    )
    truths = [step_truth(text, done.text, prompts.chains) for text, done in answered]
    return step_auc([one.step_rewards for one in scored], truths)


def of_run(folder: Path) -> dict[str, dict[str, Any]]:
    """Step AUC of the PRM of a quickstart's folder: online, and on answers of its trained and its first policy."""
    prm = ImplicitPRM.from_pretrained(folder / "prm", device="cpu")
    return {
        "online": online(folder / "rollouts.jsonl", Chains()),
        "trained_policy": held_out(prm, str(folder / "policy")),
        "warm_start": held_out(prm, str(folder / "warm" / "policy")),
    }


MEASURED_ON = {
    "online": "online, on the logged rollouts",
    "trained_policy": "on fresh problems, answered by the trained policy",
    "warm_start": "on fresh problems, answered by the warm start",
}


def summary(found: dict[str, dict[str, Any]]) -> str:
    """What `of_run` found, in words.

    Example:
        >>> print(summary({"online": {"auc": 0.7, "steps": 900, "wrong_steps": 50}}))
        Right steps rewarded above wrong ones (step-level AUC, 0.5 is chance):
          0.700  online, on the logged rollouts (900 steps, 50 wrong)
    """
    lines = ["Right steps rewarded above wrong ones (step-level AUC, 0.5 is chance):"]
    for name, measured in found.items():
        value = "none " if measured["auc"] is None else f"{measured['auc']:.3f}"
        counts = f"{measured['steps']:,} steps, {measured['wrong_steps']:,} wrong"
        lines.append(f"  {value}  {MEASURED_ON[name]} ({counts})")
    return "\n".join(lines)
