"""What `varlen` attention cannot do is refused, model by model and layer by layer."""

import pytest
import torch
from test_logprobs import batch
from toys import tiny_lm
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from prime_lightning.models import attention
from prime_lightning.models.attention import Sequences
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.models.options import Loading
from prime_lightning.training.plan.shape import shape_of


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("gemma2", {}, "Gemma2ForCausalLM, which has soft caps"),
        ("gemma3", {"use_bidirectional_attention": True}, "attention in both directions"),
    ],
)
def test_models_that_need_more_are_refused(name, options, reason):
    model = tiny_lm(name, **options)
    with pytest.raises(ValueError, match=rf"`attention: varlen`, got .*{reason}"):
        attention.check_attention(model, "varlen")
    with pytest.raises(ValueError, match=rf"`attention: varlen`, got .*{reason}"):
        shape_of(model.config, "varlen")


def test_a_soft_cap_is_not_left_out_by_sdpa():
    model = tiny_lm("gemma2", attn_logit_softcapping=1.0)
    with pytest.raises(ValueError, match="`attention: sdpa`, got Gemma2ForCausalLM, which has soft caps"):
        attention.check_attention(model, "sdpa")
    attention.check_attention(model, "eager")


def test_recurrent_layers_are_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "vocab_size": 29, "num_experts": 2}
    config = Qwen3NextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts_per_tok=1)
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config)
    with pytest.raises(ValueError, match="layers of the kinds linear_attention and a recurrent state"):
        attention.check_attention(model, "varlen")
    with pytest.raises(ValueError, match=r"got Qwen3NextForCausalLM, in which responses would run into one another"):
        ScoringLM(model, packed=True)


@pytest.mark.parametrize("more", [{"softcap": 5.0}, {"s_aux": torch.ones(1)}, {"is_causal": False}, {"dropout": 0.1}])
def test_a_layer_that_asks_for_more_is_refused(more):
    x = torch.ones(1, 1, 2, 8)
    with pytest.raises(ValueError, match="Expected causal softmax attention"):
        attention.varlen(torch.nn.Identity(), x, x, x, None, sequences=Sequences.of((2,)), **more)


def test_padded_rows_are_refused():
    with pytest.raises(ValueError, match="packed: true"):
        Loading(attention="varlen")
    with pytest.raises(ValueError, match="Expected packed rows for the attention `varlen`"):
        ScoringLM(tiny_lm(attention="varlen"))(*batch())
