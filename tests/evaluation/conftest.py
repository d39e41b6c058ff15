"""Models that only the benchmarks need."""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from prime_lightning.prompts.arithmetic import build_tokenizer, write_model


@pytest.fixture(scope="session")
def silent_model(tmp_path_factory):
    """A model that gives nothing but its end token."""
    folder = write_model(tmp_path_factory.mktemp("silent"), hidden_size=32)
    model = Qwen2ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[build_tokenizer().eos_token_id] = 4.0
    model.save_pretrained(folder)
    return str(folder)
