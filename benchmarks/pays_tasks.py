"""The tasks of benchmarks/pays.py, and their oracle: step truths that are known because the tasks are made up.

Chains of arithmetic are the package's own (`prime_lightning.prompts.arithmetic`), with another teacher. Look-ups and
hops ask for values of a secret table: look-ups for a list of them, right only if all are, of which none depends on the
one before; hops for the last of a chain, in which each value is the key of the next.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from prime_lightning import algorithms as alg
from prime_lightning.models.batch import Batch
from prime_lightning.prompts.arithmetic import DIGITS, OPERATIONS, ArithmeticPrompts, Chains, step_truth
from prime_lightning.prompts.dataset import Prompts
from prime_lightning.rollout import Rollout
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.panel import Iteration

VALUES = 12  # of look-ups
RELATIONS = OPERATIONS + DIGITS  # of hops, as they are written


@functools.lru_cache(maxsize=4)
def table(seed: int, shaky: float, low: float, high: float, good: float) -> tuple[Any, Any, Any]:
    """Of each key: its value, the one wrong value it is taken for, and how often the teacher is right."""
    rng = np.random.default_rng([4321, seed])
    keys = len(OPERATIONS) * len(DIGITS)
    true = rng.integers(0, VALUES, keys)
    wrong = (true + rng.integers(1, VALUES, keys)) % VALUES
    right = np.full(keys, good)
    count = round(shaky * keys)
    right[rng.permutation(keys)[:count]] = np.linspace(low, high, count)  # the same error budget for every table
    return true, wrong, right


class LookupPrompts(Prompts):
    """Problems such as `^+a-3*k=` with the answer `7b0`: the values of three keys, of which there are 96.

    Args:
        seed: Of the problems.
        keys: Of one problem.
        table_seed: Which values the keys have.
    """

    kind = "exact"
    source = "lookups"
    template = ArithmeticPrompts.template

    def __init__(self, seed: int = 0, keys: int = 4, table_seed: int = 0) -> None:
        self.seed, self.keys, self.table_seed = seed, keys, table_seed

    def row(self, draw: int) -> Mapping[str, Any]:
        """The problem, its answer and its true values."""
        keys = np.random.default_rng([self.seed, draw]).integers(0, len(OPERATIONS) * len(DIGITS), self.keys)
        true, _, _ = table(self.table_seed, 0.5, 0.2, 0.8, 0.99)
        results = [int(true[key]) for key in keys]
        return {"problem": written(keys), "answer": "".join(DIGITS[r] for r in results), "results": results}


class LookupLessons:
    """Answers of a teacher with a fixed misconception for half of the keys.

    Args:
        size: Number of lessons.
        seed: Of the problems and of the slips.
        keys: Of one problem.
        table_seed: Which values the keys have.
    """

    template = LookupPrompts.template

    def __init__(self, size: int = 64_000, seed: int = 10_000, keys: int = 4, table_seed: int = 0) -> None:
        self.size, self.seed, self.keys, self.table_seed = size, seed, keys, table_seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        keys = rng.integers(0, len(OPERATIONS) * len(DIGITS), self.keys)
        true, wrong, right = table(self.table_seed, 0.5, 0.2, 0.8, 0.99)
        said = [DIGITS[true[k] if rng.random() < right[k] else wrong[k]] for k in keys]
        return {"problem": written(keys), "response": "".join(f"{s};" for s in said) + "#" + "".join(said)}


def written(keys: Any) -> str:
    """Keys as a problem's text."""
    return "^" + "".join(OPERATIONS[k // len(DIGITS)] + DIGITS[k % len(DIGITS)] for k in keys) + "="


class HopPrompts(Prompts):
    """Problems such as `^5+-*=` with an answer such as `g`: from 5 by the relation `+`, from there by `-`, and so on.

    A fact is where a relation leads from a value; each relation has 32.

    Args:
        seed: Of the problems.
        hops: Of one problem.
        relations: How many there are.
        table_seed: Where they lead.
    """

    kind = "exact"
    source = "hops"
    template = ArithmeticPrompts.template

    def __init__(self, seed: int = 0, hops: int = 12, relations: int = 3, table_seed: int = 0) -> None:
        self.seed, self.hops, self.table = seed, hops, (table_seed, relations)

    def row(self, draw: int) -> Mapping[str, Any]:
        """The problem, its answer, and which table it asks for."""
        problem = hops(np.random.default_rng([self.seed, draw]), self.hops, self.table[1])
        answer = followed(problem, hop_table(*self.table)[0])[-1]
        return {"problem": problem, "answer": answer, "table": self.table}


class HopLessons:
    """Answers of a teacher with a fixed misconception for some of the facts, written as `e;3;g;#g`.

    Args:
        size: Number of lessons.
        seed: Of the problems and of the slips.
        hops: Of one problem.
        relations: How many there are.
        table_seed: Where they lead.
    """

    template = HopPrompts.template

    def __init__(
        self, size: int = 64_000, seed: int = 10_000, hops: int = 12, relations: int = 3, table_seed: int = 0
    ) -> None:
        self.size, self.seed, self.hops, self.table = size, seed, hops, (table_seed, relations)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        true, wrong, right = hop_table(*self.table)
        problem = hops(rng, self.hops, self.table[1])
        said = followed(problem, np.where(rng.random(len(true)) < right, true, wrong))
        return {"problem": problem, "response": "".join(f"{s};" for s in said) + "#" + said[-1]}


@functools.lru_cache(maxsize=4)
def hop_table(seed: int, relations: int) -> tuple[Any, Any, Any]:
    """As `table`, for facts; a relation leads from no two values to the same one, so that a wrong step seldom heals."""
    rng = np.random.default_rng([8765, seed])
    true = np.concatenate([rng.permutation(len(DIGITS)) for _ in range(relations)])
    wrong = (true + rng.integers(1, len(DIGITS), len(true))) % len(DIGITS)
    right = np.full(len(true), 0.985)
    shaky = rng.permutation(len(true))[: round(0.3 * len(true))]
    right[shaky] = np.linspace(0.2, 0.6, len(shaky))
    return true, wrong, right


def hops(rng: np.random.Generator, count: int, relations: int) -> str:
    """A value to start from, and relations."""
    return f"^{rng.choice(list(DIGITS))}{''.join(rng.choice(list(RELATIONS[:relations]), count))}="


def followed(problem: str, facts: Any) -> list[str]:
    """The values that a problem's relations lead to, by these facts."""
    found = [problem[1]]
    for relation in problem[2:-1]:
        found.append(DIGITS[facts[fact(relation, found[-1])]])
    return found[1:]


def fact(relation: str, value: str) -> int:
    """The key of a relation from a value."""
    return RELATIONS.index(relation) * len(DIGITS) + DIGITS.index(value)


def truths(rollout: Rollout) -> list[bool]:
    """Whether each written step of an answer is right, given what was written before it."""
    row, text = rollout.prompt.row, rollout.completion.text
    if rollout.prompt.source == "arithmetic":
        return step_truth(rollout.prompt.text, text, Chains(modulus=row["modulus"]))
    said = text.split("#")[0].split(";")[:-1]
    if rollout.prompt.source == "hops":
        facts = hop_table(*row["table"])[0]
        steps = zip(rollout.prompt.text[2:-1], [rollout.prompt.text[1], *said], said, strict=False)
        return [a in [*DIGITS] and DIGITS[facts[fact(relation, a)]] == b for relation, a, b in steps]
    return [one == DIGITS[true] for one, true in zip(said, row["results"], strict=False)]


def spans(rollout: Rollout, tokens: list[str]) -> list[tuple[int, int, bool]]:
    """First token, token after the last, and truth of each step; a token is a character or a special one."""
    text = "".join(token if len(token) == 1 else "?" for token in tokens)
    found, start = [], 0
    for right in truths(rollout):
        stop = text.find(";", start) + 1
        if stop == 0:
            break
        found.append((start, stop, right))
        start = stop
    return found


def step_rewards(reward_BT: Tensor, batch: Batch, tokenizer: Any) -> tuple[list[float], list[bool]]:
    """Summed reward and truth of each step of all responses."""
    rewards, rights = [], []
    for reward_T, rollout in zip(reward_BT, batch.rollouts, strict=True):
        for start, stop, right in spans(rollout, [tokenizer.decode([i]) for i in rollout.completion.token_ids]):
            rewards.append(float(reward_T[start:stop].sum()))
            rights.append(right)
    return rewards, rights


def step_auc(reward_BT: Tensor, batch: Batch, tokenizer: Any) -> float | None:
    """Chance that a right step is rewarded above a wrong one; None where there is but one kind."""
    rewards, rights = step_rewards(reward_BT, batch, tokenizer)
    known_N = torch.ones(len(rights), dtype=torch.bool)
    value = float(alg.auc(torch.tensor(rewards), torch.tensor(rights).float(), known_N))
    return None if value != value else value


class Watch(pl.Callback):
    """Keeps what each iteration sampled and how the PRM judged steps; ends the run at its budget of rollouts.

    Args:
        budget: Rollouts.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.curve: list[tuple[int, float]] = []
        self.step_auc: list[float | None] = []
        self.tokens = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        iteration: Iteration = outputs["iteration"]
        numbers, reward_BT = iteration.metrics, iteration.process_BT
        self.curve.append((int(numbers["rollout/responses"]), float(numbers["rollout/accuracy"])))
        self.tokens += int(numbers["rollout/tokens"])
        known = reward_BT is not None
        self.step_auc.append(step_auc(reward_BT, iteration.batch, module.tokenizer) if known else None)
        trainer.should_stop = sum(n for n, _ in self.curve) >= self.budget


class OraclePrime(PrimeModule):
    """PRIME whose process reward is the truth: -1 on the first token of each wrong step. The headroom of any PRM."""

    def judge_prm(self, batch: Batch, prm_BT: Tensor | None, reference_BT: Tensor | None) -> Tensor | None:
        """The gate is open from the first iteration on."""
        self.gate.update(0.0, 1.0)
        return prm_BT

    def process_reward(
        self, batch: Batch, prm_BT: Tensor | None, reference_BT: Tensor | None, proximal_BT: Tensor | None
    ) -> Tensor | None:
        """Known truths instead of Eq. 3."""
        reward_BT = torch.zeros_like(batch.behaviour_logprobs_BT)
        for i, rollout in enumerate(batch.rollouts):
            tokens = [self.tokenizer.decode([token]) for token in rollout.completion.token_ids]
            for start, _, right in spans(rollout, tokens):
                reward_BT[i, start] = -float(not right)
        return alg.normalise(reward_BT, batch.mask_BT, self.reward.normalise, all_reduce=self.stepper.all_reduce)[0]
