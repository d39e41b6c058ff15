"""TRL's RLOOTrainer on the tokens of `benchmarks/training.py`, which starts this in an environment of TRL's own.

The same prompts' and answers' lengths, weights, optimizer, micro-batches and precision; one optimizer step an
iteration, no KL penalty, every second answer right.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import accelerate
import torch
import transformers
import trl
from datasets import Dataset
from memory import peak_gib  # beside this file, whose folder is the first that a script looks in
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Timed(trl.RLOOTrainer):  # type: ignore[misc]
    """Takes prompts as numbers, of which it makes random tokens, and takes down how long it generates."""

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        tokenizer = self.processing_class
        ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(int(prompt))
            chosen = torch.randint(len(ordinary), (self.prompt_tokens,), generator=generator).tolist()
            rows.append([ordinary[i] for i in chosen])
        return rows, None, {}

    def _generate(self, *args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        generated = super()._generate(*args, **options)
        self.seconds.append(time.perf_counter() - begun)
        return generated


class Clock(TrainerCallback):  # type: ignore[misc]
    """When training starts, and when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def micro_batch(options: argparse.Namespace) -> int:
    """The most rows that divide the rollouts and keep to `micro_tokens`."""
    most = max(1, options.micro_tokens // (options.prompt_tokens + options.answer_tokens))
    return max(n for n in range(1, most + 1) if options.rollouts % n == 0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    micro, tokens = micro_batch(options), []
    scores = itertools.cycle((0.0, 1.0))

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [next(scores) for _ in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = trl.RLOOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=options.rollouts // micro,
            num_generations=options.samples,
            max_completion_length=options.answer_tokens,
            generation_kwargs={"min_new_tokens": options.answer_tokens},
            max_steps=1 + options.iterations,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            optim="adamw_torch",
            beta=0.0,
            temperature=1.0,
            bf16=options.precision == "bf16-mixed",
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(4096)]),
            processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
            callbacks=[clock],
        )
        trainer.prompt_tokens, trainer.seconds = options.prompt_tokens, []
        trainer.train()
    return summary([b - a for a, b in itertools.pairwise(clock.times)][1:], trainer.seconds[1:], tokens[1:])


def summary(iterations: list[float], samplings: list[float], tokens: list[int]) -> dict[str, Any]:
    """Means over the iterations but the first."""
    iteration, sample = statistics.fmean(iterations), statistics.fmean(samplings)
    packages = {"trl": trl, "transformers": transformers, "torch": torch, "accelerate": accelerate}
    return {
        "seconds": {"iteration": iteration, "sample": sample, "training": iteration - sample},
        "answer_tokens": tokens[-1],
        "peak_gib": peak_gib(),
        "versions": {"python": platform.python_version()} | {name: of.__version__ for name, of in packages.items()},
    }


if __name__ == "__main__":
    options = argparse.Namespace(**json.loads(sys.argv[4]))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    Path(sys.argv[3]).write_text(json.dumps(measure(options)))
