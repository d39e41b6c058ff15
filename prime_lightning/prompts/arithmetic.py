"""The embedded default: chained arithmetic, a tiny Qwen2-architecture model and its tokenizer, all made on the spot.

A prompt is a chain such as `^5-8+7=`, computed from left to right modulo 10; the answer writes one running result per
step and then the final one: `7;4;#4`. The verifier reads the final result only, yet the truth of each step is known.
The teacher of the warm start is imperfect on purpose: for some facts (operation, left, right) it usually says one fixed
wrong result, so that the warm-started model has habits for PRIME to unlearn.

It leaves out everything that makes language hard; it is for seeing the loop work, not for claims about methods.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from prime_lightning.prompts.dataset import Prompts, Template
from prime_lightning.rollout import Rollout

DIGITS = "0123456789abcdefghijklmnopqrstuv"
OPERATIONS = "+-*"


@dataclass(frozen=True, kw_only=True)
class Chains:
    """The task: chains of `operations` operations modulo `modulus`.

    Example:
        >>> chains = Chains(operations=3)
        >>> chains.results("^5-8+7*2=")
        [7, 4, 8]
        >>> chains.solution([7, 4, 8])
        '7;4;8;#8'
    """

    operations: int = 10
    modulus: int = 10

    def __post_init__(self) -> None:
        if not 2 <= self.modulus <= len(DIGITS):
            raise ValueError(f"Expected a modulus in 2..{len(DIGITS)}, got {self.modulus}.")

    def problem(self, rng: np.random.Generator) -> str:
        """A random chain."""
        numbers = rng.integers(1, self.modulus, self.operations)
        operations = rng.integers(0, len(OPERATIONS), self.operations)
        steps = (OPERATIONS[o] + DIGITS[b] for o, b in zip(operations, numbers, strict=True))
        return f"^{DIGITS[rng.integers(0, self.modulus)]}{''.join(steps)}="

    def apply(self, operation: str, left: int, right: int) -> int:
        """One operation modulo `modulus`."""
        return {"+": left + right, "-": left - right, "*": left * right}[operation] % self.modulus

    def results(self, problem: str) -> list[int]:
        """The true running results of a chain."""
        value, results = DIGITS.index(problem[1]), []
        for operation, right in zip(problem[2:-1:2], problem[3:-1:2], strict=True):
            value = self.apply(operation, value, DIGITS.index(right))
            results.append(value)
        return results

    @staticmethod
    def solution(results: list[int]) -> str:
        """Running results as an answer's text."""
        return "".join(f"{DIGITS[r]};" for r in results) + f"#{DIGITS[results[-1]]}"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """An imperfect solver: a share of all facts is shaky, and a shaky fact often gets its one fixed wrong result.

    Example:
        >>> Teacher(shaky=0.0, reliability=1.0).solve("^5-8+7*2=", np.random.default_rng(0))
        '7;4;8;#8'
    """

    chains: Chains = Chains()
    shaky: float = 0.3
    """Share of facts that are shaky."""
    shaky_from: float = 0.3
    """A shaky fact is right with a probability between this ..."""
    shaky_to: float = 0.95
    """... and this, drawn once a fact."""
    reliability: float = 0.985
    """Probability that any other fact is right."""
    seed: int = 1234
    """Which facts are shaky, and what is said instead."""

    def solve(self, problem: str, rng: np.random.Generator) -> str:
        """A worked answer, mistakes included; each step goes on from the result that was written."""
        right_probability, slip = _habits(self)
        value, results = DIGITS.index(problem[1]), []
        for operation, right in zip(problem[2:-1:2], problem[3:-1:2], strict=True):
            fact = OPERATIONS.index(operation), value, DIGITS.index(right)
            value = self.chains.apply(operation, value, fact[2])
            if rng.random() > right_probability[fact]:
                value = int(value + slip[fact]) % self.chains.modulus
            results.append(value)
        return self.chains.solution(results)


@functools.lru_cache(maxsize=4)
def _habits(teacher: Teacher) -> tuple[np.ndarray, np.ndarray]:
    """`[operation, left, right]` probability of being right, and the shift of the fixed wrong result."""
    rng = np.random.default_rng(teacher.seed)
    shape = (len(OPERATIONS), teacher.chains.modulus, teacher.chains.modulus)
    slip = rng.integers(1, teacher.chains.modulus, shape)
    shaky = rng.random(shape) < teacher.shaky
    return np.where(shaky, rng.uniform(teacher.shaky_from, teacher.shaky_to, shape), teacher.reliability), slip


class ArithmeticPrompts(Prompts):
    """Endless fresh chains; the draw-th one depends on nothing but the seed and the draw.

    Args:
        seed: Of the problems. Training, evaluation and warm start take different ones.
        operations: Length of a chain.
        modulus: Of the arithmetic.
    """

    kind = "exact"
    source = "arithmetic"
    template = Template(user="{problem}", chat=False)

    def __init__(self, seed: int = 0, operations: int = 10, modulus: int = 10) -> None:
        self.seed = seed
        self.chains = Chains(operations=operations, modulus=modulus)

    def row(self, draw: int) -> Mapping[str, Any]:
        """The problem, its answer and its true running results."""
        problem = self.chains.problem(np.random.default_rng([self.seed, draw]))
        results = self.chains.results(problem)
        return {
            "problem": problem,
            "answer": DIGITS[results[-1]],
            "results": results,
            "modulus": self.chains.modulus,
        }


class ArithmeticLessons:
    """Worked answers of an imperfect teacher, for the warm start: rows with `problem` and `response`.

    Args:
        size: Number of lessons; each is a fresh problem.
        seed: Of the problems and of the teacher's slips.
        operations: Length of a chain.
        modulus: Of the arithmetic.
        teacher: Who answers; its own chains are not read.
    """

    template = ArithmeticPrompts.template

    def __init__(
        self,
        size: int = 64_000,
        seed: int = 10_000,
        operations: int = 10,
        modulus: int = 10,
        teacher: Teacher = Teacher(),
    ) -> None:
        self.size, self.seed = size, seed
        self.teacher = replace(teacher, chains=Chains(operations=operations, modulus=modulus))

    def __len__(self) -> int:
        """Number of lessons."""
        return self.size

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The index-th lesson."""
        if not 0 <= index < self.size:
            raise IndexError(index)  # ends a plain loop over the lessons
        rng = np.random.default_rng([self.seed, index])
        problem = self.teacher.chains.problem(rng)
        return {"problem": problem, "response": self.teacher.solve(problem, rng)}


def step_truth(problem: str, answer: str, chains: Chains | None = None) -> list[bool]:
    """For each written step, whether it is right given the result written before it.

    Example:
        >>> step_truth("^5-8+7*2=", "7;5;0;#0", Chains(operations=3))
        [True, False, True]
    """
    chains = chains or Chains()
    written = [DIGITS.find(step) if len(step) == 1 else -1 for step in answer.split("#")[0].split(";")[:-1]]
    left, truth = DIGITS.index(problem[1]), []
    for operation, right, value in zip(problem[2:-1:2], problem[3:-1:2], written, strict=False):
        known = 0 <= left < chains.modulus
        truth.append(known and value == chains.apply(operation, left, DIGITS.index(right)))
        left = value
    return truth


def written_steps(rollout: Rollout, tokens: list[str]) -> list[tuple[int, int, bool]]:
    """First token, token after the last, and truth of each step, for `RolloutLog.steps`; a token is a character."""
    text = "".join(token if len(token) == 1 else "?" for token in tokens)  # end and padding tokens have names
    spans, start = [], 0
    for right in step_truth(rollout.prompt.text, text, Chains(modulus=rollout.prompt.row.get("modulus", 10))):
        stop = text.index(";", start) + 1
        spans.append((start, stop, right))
        start = stop
    return spans


def build_tokenizer() -> Qwen2Tokenizer:
    """One token a character; others are left out. Its class is the one that transformers loads for a Qwen2 model.

    Example:
        >>> build_tokenizer().decode(build_tokenizer()("7;#7")["input_ids"])
        '7;#7'
    """
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *DIGITS, *OPERATIONS, *"=;#^"])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token="<pad>", eos_token="<eos>", pad_token="<pad>")


def write_model(folder: str | Path, *, seed: int = 0, hidden_size: int = 64, layers: int = 2) -> Path:
    """Write a freshly initialised tiny model and its tokenizer as a Hugging Face folder."""
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 32),  # heads of 32, the smallest that vLLM takes on a CPU
        num_key_value_heads=max(1, hidden_size // 32),
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
