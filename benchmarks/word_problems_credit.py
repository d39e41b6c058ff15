"""Does the process reward fall where an answer goes wrong? The truth comes from the problem's equation.

An answer is right if the verifier says so. In a wrong one, the words are right as long as an answer made from the
equation begins with them, its addends and factors in any order; the first that leaves all of those is wrong, and
none behind it is judged. So who gets there by another equation, and then errs, is blamed for where the other begins.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from word_problems_lessons import checked, worked

from prime_lightning.engines.hf import HFEngine
from prime_lightning.evaluation.statistics import bootstrap
from prime_lightning.models.options import Loading, cpu_precision
from prime_lightning.models.steps import steps_of_tokens
from prime_lightning.prm.credit import step_auc
from prime_lightning.prm.implicit import ImplicitPRM, Scored
from prime_lightning.prompts.dataset import DatasetPrompts, Template
from prime_lightning.rollout import Label, Sampling
from prime_lightning.verifiers import Verifiers


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of an answer, as far as they can be judged: which are right, and their rewards."""

    truths: list[bool]
    rewards: list[float]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An answer: whether it is right, its reward, and its words if it is wrong."""

    right: bool
    reward: float
    words: Parts

    @property
    def whole(self) -> Parts:
        """The answer as one part."""
        return Parts(truths=[self.right], rewards=[self.reward])


def credit(folder: Path, held_out: Path, template: Mapping[str, Any], wrong: int = 100) -> dict[str, Any]:
    """AUC of a run's PRM on fresh answers of its policy, until so many have a known wrong word."""
    prm = ImplicitPRM.from_pretrained(folder / "prm", loading=Loading(dtype=number_format()), device="cpu")
    judged = list(until(answers(str(folder / "policy"), held_out, Template(**template), prm), wrong))
    words = [one.words for one in judged if not one.right]
    later = [one for one in words if len(one.truths) > 1]
    falls = [float(one.rewards[-1] < fmean(one.rewards[:-1])) for one in later]
    return {
        "answers": len(judged),
        "wrong_answers": len(words),
        "whole": measured([one.whole for one in judged]),
        "words_of_wrong": measured(words),
        "falls": {"of": len(falls), "share": fmean(falls) if falls else None},
    }


def number_format() -> Literal["float32", "bfloat16"]:
    """bfloat16 where the processor multiplies it; elsewhere it is several times slower than float32."""
    return "bfloat16" if cpu_precision() == "bf16-mixed" else "float32"


def until(judged: Iterator[Judged], wrong: int) -> Iterator[Judged]:
    """All answers up to the last of so many wrong ones."""
    for one in judged:
        yield one
        wrong -= not one.right
        if wrong == 0:
            return


def answers(policy: str, held_out: Path, template: Template, prm: ImplicitPRM, at_a_time: int = 32) -> Iterator[Judged]:
    """One answer to each problem at temperature 1, judged and scored; without those where no word can be blamed."""
    engine = HFEngine(batch_size=at_a_time, dtype=number_format(), device="cpu")
    engine.start(policy)
    prompts = DatasetPrompts(str(held_out), template=template, shuffle=False)
    with Verifiers() as verifiers:
        for start in range(0, len(prompts), at_a_time):
            draws = range(start, min(start + at_a_time, len(prompts)))
            asked = [prompts.prompt(draw, engine.tokenizer) for draw in draws]
            sampled = [(p, done[0]) for p, done in engine.stream(asked, Sampling(samples=1, max_tokens=48))]
            sampled = [(p, done) for p, done in sampled if done.text.strip() and not done.truncated]
            scored = prm.score([p.text for p, _ in sampled], [done.text for _, done in sampled])
            for (prompt, done), one in zip(sampled, scored, strict=True):
                verdict = verifiers.verify(prompt, done.text)
                words = judged_words(done.text, one, prompt.row)
                if verdict.label is Label.CORRECT or (verdict.label is Label.WRONG and not all(words.truths)):
                    yield Judged(right=verdict.label is Label.CORRECT, reward=one.reward, words=words)


def judged_words(text: str, one: Scored, row: Mapping[str, Any]) -> Parts:
    """The words up to the first wrong one, and the sums of their tokens' rewards."""
    spans = [found.span() for found in re.finditer(r"\s*\S+", text)]  # tokens begin with the space before a word
    starts = itertools.accumulate((len(token) for token in one.tokens[:-1]), initial=0)
    rewards = [0.0] * len(spans)
    for word, reward in zip(steps_of_tokens(list(starts), spans), one.token_rewards, strict=True):
        rewards[word] += reward
    truths = word_truths(text.split(), row)
    return Parts(truths=truths, rewards=rewards[: len(truths)])


def word_truths(words: Sequence[str], row: Mapping[str, Any]) -> list[bool]:
    r"""Whether each word is right, up to the first wrong one.

    Example:
        >>> row = {"problem": "Of 9 sell 2, buy 4.", "answer": "11", "equation": "+ - number0 number1 number2"}
        >>> word_truths(r"Subtract, add: \boxed{4 + (2 - 9)}".split(), row)
        [True, True, True, True, False]
    """
    solved = checked(row)
    ways = [worked(way).split() for way in solved.ways()] if solved else []
    right = max((common(way, words) for way in ways), default=0)
    return [True] * right + [False] * (right < len(words))


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of what both begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def measured(parts: Sequence[Parts]) -> dict[str, Any]:
    """AUC of the parts' rewards, with a 95 % interval by drawing answers anew."""

    def auc(some: Iterable[Parts]) -> dict[str, Any]:
        return step_auc([one.rewards for one in some], [one.truths for one in some])

    found = auc(parts)
    if found["auc"] is None:
        return found | {"interval": None}

    def drawn(some: np.ndarray) -> float:
        value = auc(some)["auc"]
        return np.nan if value is None else value

    return found | {"interval": list(bootstrap(drawn, np.array(parts, object), seed=0, resamples=500))}
