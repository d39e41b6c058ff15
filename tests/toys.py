"""Small things that several tests build: rollouts, files, models."""

import json

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from prime_lightning.rollout import Completion, Finish, Prompt, Rollout, Verdict

TINY = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # far from uniform, so that an error of any kind shows
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}


def tiny_lm(kind="qwen2", *, seed=0, attention="sdpa", **options):
    """A random causal LM of 29 tokens, in evaluation mode."""
    config_class, model_class = CLASSES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = config_class(**TINY | options)
        config._attn_implementation = attention
        return model_class(config).eval()


def rollout(draw=0, prompt=(2, 3), response=(4, 1), score=1.0, *, finish=Finish.STOP, text="7;#7", version=0):
    """One rollout; a score of None is an unknown verdict."""
    return Rollout(
        prompt=Prompt(draw=draw, token_ids=tuple(prompt), text="^1+6=", kind="exact", answer="7", source="sums"),
        completion=Completion(
            text=text,
            token_ids=list(response),
            logprobs=[-0.5 - t for t in range(len(response))],
            finish=finish,
            versions=[version] * len(response),
        ),
        verdict=Verdict.unknown("lost") if score is None else Verdict.of_score(score),
    )


def prompt(draw, token_ids):
    """A prompt that nobody grades."""
    return Prompt(draw=draw, token_ids=tuple(token_ids), text="", kind="exact")


def write_jsonl(path, rows):
    """A jsonl file; returns its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
