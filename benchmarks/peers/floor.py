"""The passes of an iteration in plain `transformers`, on as many tokens: the floor of `benchmarks/training.py`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class Floor:
    """One model by hand."""

    def __init__(self, role: str, options: argparse.Namespace) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        self.model.requires_grad_(role != "reference")
        self.options, self.prompt = options, options.prompt_tokens
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None
        self.micro = max(1, options.micro_tokens // (options.prompt_tokens + options.answer_tokens))

    def logprobs(self, tokens_bl: Tensor) -> Tensor:
        """Of the response tokens, `[b * t]`."""
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=self.options.precision == "bf16-mixed")
        with mixed:
            hidden_blh = self.model.base_model(input_ids=tokens_bl, use_cache=False).last_hidden_state
            logits_btv = self.model.lm_head(hidden_blh[:, self.prompt - 1 : -1])
        targets_bt = tokens_bl[:, self.prompt :]
        return -torch.nn.functional.cross_entropy(
            logits_btv.flatten(0, 1).float(), targets_bt.flatten(), reduction="none"
        )

    @torch.no_grad()
    def forward(self, tokens_BL: Tensor) -> None:
        for tokens_bl in tokens_BL.split(self.micro):
            self.logprobs(tokens_bl)

    def update(self, tokens_BL: Tensor) -> None:
        assert self.optimizer is not None
        for minibatch_bl in tokens_BL.chunk(self.options.minibatches):
            for tokens_bl in minibatch_bl.split(self.micro):
                (-self.logprobs(tokens_bl).sum() / minibatch_bl[:, self.prompt :].numel()).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def floor(options: argparse.Namespace) -> dict[str, Any]:
    """The passes of the product; a share of a pass is one over a share of the rows."""
    shape = options.rollouts, options.prompt_tokens + options.answer_tokens
    models = {role: Floor(role, options) for role in sorted({name.split()[0] for name in options.passes})}
    tokens_BL = torch.randint(models["policy"].model.config.vocab_size, shape)
    rows = [one_floor(models, tokens_BL, options.passes) for _ in range(1 + options.iterations)][1:]
    found = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return {"seconds": found, "passes": options.passes, "answer_tokens": options.rollouts * options.answer_tokens}


def one_floor(models: dict[str, Floor], tokens_BL: Tensor, passes: dict[str, float]) -> dict[str, float]:
    """One iteration, without sampling."""
    spent = Counter[str]()
    for name, count in passes.items():
        role, what = name.split()
        for whole in range(int(-(-count // 1))):
            rows = round(min(1.0, count - whole) * len(tokens_BL))
            begun = time.perf_counter()
            getattr(models[role], what)(tokens_BL[:rows])
            spent["score" if what == "forward" else role] += time.perf_counter() - begun
    return {**spent, "training": sum(spent.values())}
