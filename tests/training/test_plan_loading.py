"""`plan` counts what options of `model.loading` cost: a float32 head on the device, a model's load on the host."""

import copy

import pytest
import torch
from test_plan import CONFIGS, allocated, setup
from transformers import AutoModelForCausalLM

from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.training.plan import estimates
from prime_lightning.training.plan.estimates import Sharding
from prime_lightning.training.plan.report import memory_of, switched
from prime_lightning.training.plan.shape import logits_bytes, shape_of, work_bytes


def real_work(config, head, dtype, autocast):
    """Peak bytes of a forward and backward of 8 rows of 64 tokens, gradients of weights dropped."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    scoring = ScoringLM(model, chunk_tokens=100, head_dtype=head)
    tokens, prompts, responses = torch.randint(1000, (8, 64)), torch.full((8,), 1), torch.full((8,), 63)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            scoring(tokens, prompts, responses)[0].sum().backward()

    run()
    return allocated(run)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_float32_head_is_what_a_real_backward_allocates(name, dtype, autocast):
    config = CONFIGS[name]
    planned = work_bytes(config, 512, 100, dtype, autocast=autocast, checkpointing=False, head="float32")
    real = real_work(config, "float32", dtype, autocast)
    assert real <= planned <= 1.2 * real


def test_a_float32_head_has_a_copy_of_its_weight_and_the_copys_gradient():
    shape = shape_of(CONFIGS["untied"])
    plain, wide = (logits_bytes(shape, 1, torch.bfloat16, autocast=False, head=head) for head in (None, "float32"))
    copy = 4 * shape.vocabulary * shape.hidden
    assert wide - plain == pytest.approx(2 * copy, rel=0.03)  # one token has next to no logits of its own


@pytest.fixture
def _here(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.usefixtures("_here")
def test_a_run_with_a_float32_head_needs_more_and_is_told_so(warm_model, monkeypatch):
    monkeypatch.setattr("prime_lightning.training.plan.report.WORTH", 1.0)
    words = ("--trainer.strategy=deepspeed_stage_2", "--trainer.precision=bf16-mixed")
    plain = setup(warm_model, *words)
    wide = setup(warm_model, *words, "--model.loading.head_dtype=float32")
    more = [memory_of(one, estimates.GIB).training["logits"] for one in (plain, wide)]
    assert more[1] > more[0]
    assert "model.loading.head_dtype: null" in [switch.words for switch in switched(wide, estimates.GIB)]


@pytest.mark.usefixtures("_here")
def test_the_host_holds_a_model_while_it_is_loaded_but_under_zero_3(warm_model):
    parameters = sum(p.numel() for p in load_causal_lm(str(warm_model)).parameters())
    assert memory_of(setup(warm_model), estimates.GIB).loading == 4 * parameters
    assert memory_of(setup(warm_model, "--model.loading.dtype=bfloat16"), estimates.GIB).loading == 2 * parameters
    assert estimates.loading_bytes(parameters, 4, Sharding(gpus=8, stage=3)) == 4 * parameters  # FSDP2
    assert estimates.loading_bytes(parameters, 4, Sharding(gpus=8, stage=3, masters=True)) == 0
