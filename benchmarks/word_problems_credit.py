"""Does the process reward fall at the first wrong number of an answer? The truth comes from the problem's equation.

By lines: one is right if its last number is a result of the equation, or its answer. In an answer with a wrong end, the
lines up to the first wrong one are judged, that one among them, and none behind it; in one with a right end all lines
are right. So an answer that gets there another way is right, and a detour to a wrong end wrong at its start.

By words, in answers with a wrong end alone: the first number that is neither the problem's nor one of those results is
wrong, all words before it are right, and none behind it is judged.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from word_problems_lessons import NEAR, checked, numbers

from prime_lightning.engines.hf import HFEngine
from prime_lightning.evaluation.statistics import bootstrap
from prime_lightning.models.options import Loading, cpu_precision
from prime_lightning.models.steps import StepRule, steps_of_tokens
from prime_lightning.prm.credit import step_auc
from prime_lightning.prm.implicit import ImplicitPRM, Scored
from prime_lightning.prompts.dataset import DatasetPrompts, Template
from prime_lightning.rollout import Sampling

LINES = StepRule(rule="newline")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of an answer, as far as they can be judged: which are right, and their rewards."""

    truths: list[bool]
    rewards: list[float]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An answer."""

    right: bool
    lines: Parts
    words: Parts


def credit(folder: Path, held_out: Path, template: Mapping[str, Any], wrong: int = 100) -> dict[str, Any]:
    """Step AUC of a run's PRM on fresh answers of its policy, until so many have a known wrong line."""
    prm = ImplicitPRM.from_pretrained(
        folder / "prm", reference=str(folder / "policy"), loading=Loading(dtype=number_format()), device="cpu"
    )
    judged = list(until(answers(str(folder / "policy"), held_out, Template(**template), prm), wrong))
    of_wrong = [one for one in judged if not one.right]
    words = [one.words for one in of_wrong if len(one.words.truths) > 1 and not all(one.words.truths)]
    falls = [float(one.rewards[len(one.truths) - 1] < fmean(one.rewards[: len(one.truths) - 1])) for one in words]
    return {
        "answers": len(judged),
        "wrong_answers": len(of_wrong),
        "lines": measured([one.lines for one in judged]),
        "lines_of_wrong": measured([one.lines for one in of_wrong]),
        "words_of_wrong": measured(words),
        "falls": {"of": len(falls), "share": fmean(falls) if falls else None},
    }


def number_format() -> Literal["float32", "bfloat16"]:
    """bfloat16 where the processor multiplies it; elsewhere it is several times slower than float32."""
    return "bfloat16" if cpu_precision() == "bf16-mixed" else "float32"


def until(judged: Iterator[Judged], wrong: int) -> Iterator[Judged]:
    """All answers up to the last of so many with a wrong step."""
    for one in judged:
        yield one
        wrong -= not all(one.lines.truths)
        if wrong == 0:
            return


def answers(policy: str, held_out: Path, template: Template, prm: ImplicitPRM, at_a_time: int = 32) -> Iterator[Judged]:
    """One answer to each problem at temperature 1, judged and scored; without those that hold no wrong number."""
    engine = HFEngine(batch_size=at_a_time, dtype=number_format(), device="cpu")
    engine.start(policy)
    prompts = DatasetPrompts(str(held_out), template=template, shuffle=False)
    for start in range(0, len(prompts), at_a_time):
        draws = range(start, min(start + at_a_time, len(prompts)))
        asked = [prompts.prompt(draw, engine.tokenizer) for draw in draws]
        sampled = [(p, done[0]) for p, done in engine.stream(asked, Sampling(samples=1, max_tokens=96))]
        sampled = [(p, done) for p, done in sampled if done.text.strip() and not done.truncated]
        scored = prm.score([p.text for p, _ in sampled], [done.text for _, done in sampled], steps=LINES)
        for (prompt, done), one in zip(sampled, scored, strict=True):
            right, truths = line_truths(one.steps, prompt.row)
            if right or not all(truths):
                lines = Parts(truths=truths, rewards=one.step_rewards)
                yield Judged(right=right, lines=lines, words=judged_words(done.text, one, prompt.row))


def judged_words(text: str, one: Scored, row: Mapping[str, Any]) -> Parts:
    """The words up to the first wrong number, and the sums of their tokens' rewards."""
    spans = [found.span() for found in re.finditer(r"\s*\S+", text)]  # tokens begin with the space before a word
    starts = itertools.accumulate((len(token) for token in one.tokens[:-1]), initial=0)
    rewards = [0.0] * len(spans)
    for word, reward in zip(steps_of_tokens(list(starts), spans), one.token_rewards, strict=True):
        rewards[word] += reward
    return Parts(truths=word_truths([text[a:b] for a, b in spans], row), rewards=rewards)


def word_truths(words: Sequence[str], row: Mapping[str, Any]) -> list[bool]:
    """Whether each word is right, up to the first wrong number.

    Example:
        >>> row = {"problem": "Of 9 sell 2, buy 4.", "answer": "11", "equation": "+ - number0 number1 number2"}
        >>> word_truths("9 - 2 = 8. Then 8 + 4".split(), row)
        [True, True, True, True, False]
    """
    known = [*numbers(row["problem"]), Fraction(row["answer"]), *(step.result for step in checked(row) or ())]
    truths = []
    for word in words:
        truths.append(all(near(value, known) for value in numbers(word)))
        if not truths[-1]:
            break
    return truths


def line_truths(lines: Sequence[str], row: Mapping[str, Any]) -> tuple[bool, list[bool]]:
    r"""Whether an answer is right, and which of its lines are, as far as that is known.

    Example:
        >>> row = {"problem": "Of 9 sell 2, buy 4.", "answer": "11", "equation": "+ - number0 number1 number2"}
        >>> line_truths(["9 - 2 = 7.", "7 + 4 = 12.", r"\boxed{12}."], row)
        (False, [True, False])
    """
    found = [last[-1] if (last := numbers(text)) else None for text in lines]
    answer = Fraction(row["answer"])
    if found[-1] is not None and near(found[-1], [answer]):
        return True, [True] * len(lines)
    known = [answer, *(step.result for step in checked(row) or ())]
    truths = []
    for value in found:
        truths.append(value is None or near(value, known))
        if not truths[-1]:
            break
    return False, truths


def near(value: Fraction, known: Sequence[Fraction]) -> bool:
    """Whether a number is one of these, as far as four places say."""
    return any(abs(value - one) < NEAR for one in known)


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
