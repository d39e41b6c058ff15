"""A user's script, which tests/cli/test_ranks.py starts on several ranks: `call_ranks.py MODEL FOLDER RANKS`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import prime_lightning
from prime_lightning.prompts.arithmetic import ArithmeticPrompts

STRATEGY = Path(__file__).parents[2] / "conf" / "strategy" / "ddp.yaml"


def main(model: str, folder: Path, ranks: int) -> None:
    """One call; the reward is a closure, which other ranks cannot import."""
    problems = ArithmeticPrompts(seed=1, operations=2)
    rows = [{"problem": problems.row(draw)["problem"], "answer": "even"} for draw in range(8)]
    even = set("02468")

    def reward(prompt: str, completion: str, row: dict[str, str]) -> float:
        return float(any(c in even for c in completion))

    run = prime_lightning.train(
        model,
        rows,
        reward,
        folder=folder,
        config=[str(STRATEGY)] if ranks > 1 else [],
        accelerator="cpu",
        precision="32-true",
        devices=ranks,
        max_steps=2,
        sampling={"samples": 4, "max_tokens": 8},
        prompts_per_batch=4,
        accuracy_filter={"low": 0.0, "high": 1.0},
        seed=3,
    )
    print(f"rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '0'))} has {run!r}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
