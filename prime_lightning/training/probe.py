"""A greedy probe: with the weights that were just sent, does the engine say what the policy finds likeliest?

Sampled log-probs are compared at the first batch, in their mean over many tokens. This looks earlier and more sharply,
token for token: an engine that takes a token which the policy finds much less likely than another has other weights, or
computes another model.

Shapes: B answers, T tokens of the longest.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from prime_lightning.engines.ranks import rank, together
from prime_lightning.models.batch import Batch
from prime_lightning.rollout import Completion, Prompt, Rollout, Verdict
from prime_lightning.training.options import Probe
from prime_lightning.training.stepping import Stepper

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
