"""Compiled layers against plain ones, and kernels that cannot work here."""

import sys
import types

import pytest
import torch
from test_logprobs import batch, gradients, loss_of, scored
from torch.testing import assert_close
from toys import tiny_lm

from prime_lightning.models import kernels
from prime_lightning.models.options import Loading
from prime_lightning.training.scoring import load_scoring
from prime_lightning.training.stepping import RoleStrategy


@pytest.mark.timeout(600)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_are_the_plain_ones(checkpointing, monkeypatch):
    compiled, compile_ = [], torch.nn.Module.compile

    def without_inductor(layer, **options):
        compiled.append(options)
        compile_(layer, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", without_inductor)
    plain_model, model = (tiny_lm("llama", attention="varlen").train() for _ in range(2))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kernels.apply_kernels(model, "compile")
    assert compiled == [{"dynamic": True}] * 2
    options = {"packed": True, "shared_prompts": True}
    expected, found = (scored(lm, **options) for lm in (plain_model, model))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_close(gradients(model, loss_of(*found)), gradients(plain_model, loss_of(*expected)), rtol=1e-3, atol=1e-3)
    shorter = batch()[0][:3], batch()[1][:3], batch()[2][:3]
    assert_close(scored(model, shorter, **options), scored(plain_model, shorter, **options), rtol=1e-4, atol=1e-4)


def test_layers_are_not_compiled_where_each_matrix_is_gathered(model_folder):
    class ZeRO3(RoleStrategy):
        zero_stage_3 = True

    with pytest.raises(ValueError, match=r"another strategy than ZeRO-3 with `loading.kernels: compile`"):
        load_scoring(str(model_folder), Loading(kernels="compile"), ZeRO3())


def test_liger_needs_cuda_and_its_package(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"got no CUDA device: pip install \"prime-lightning\[fused\]\""):
            kernels.apply_kernels(tiny_lm(), "liger")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="got no package"):
        kernels.apply_kernels(tiny_lm(), "liger")


def test_liger_patches_norms_and_mlps_of_models_that_it_knows(monkeypatch):
    """Its package by a stand-in: its kernels do not import without a GPU's Triton."""
    calls, of_liger, patching = [], types.ModuleType("liger_kernel.transformers"), types.ModuleType("monkey_patch")
    of_liger._apply_liger_kernel_to_instance = lambda **options: calls.append(options)
    patching.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": None}
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", of_liger)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patching)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: True)
    model = tiny_lm()
    kernels.apply_kernels(model, "liger")
    assert calls == [{"model": model, "rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    with pytest.raises(ValueError, match="Expected a model that Liger has kernels for, got 'llama'"):
        kernels.apply_kernels(tiny_lm("llama"), "liger")
