"""Ways to come from hidden states to log-probs: all equal the plain one; float32 projections are nearer to the truth.

Fused kernels run on CUDA only. Stand-ins with their packages' signatures show here that they are called rightly; that
the kernels themselves compute what these say has not been run.
"""

import copy
import sys
import types

import pytest
import torch
from test_logprobs import batch, gradients, loss_of, plain, scored
from torch.testing import assert_close
from toys import tiny_lm

from prime_lightning.models import fused
from prime_lightning.models.logprobs import ScoringLM


def wide_lm(**options):
    """Logits of up to 60, where bfloat16 ones stand 0.25 apart."""
    model = tiny_lm(hidden_size=64, **options)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


def test_float32_logits_are_nearer_to_the_truth_under_autocast():
    model = wide_lm()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rounded, wide = (scored(model, head_dtype=dtype, chunk_tokens=3) for dtype in (None, "float32"))
        states = ScoringLM(model).model.model(batch()[0]).last_hidden_state
    twin = copy.deepcopy(model).double()
    twin.model.forward = lambda **_: types.SimpleNamespace(last_hidden_state=states.double())  # the same states
    exact = [x.double() for x in scored_in_float64(twin)]
    for i in range(2):  # log-probs and entropies
        errors = [(scores[i] - exact[i]).abs() for scores in (rounded, wide)]
        assert errors[1].max() < 1e-4
        assert errors[1].mean() < errors[0].mean() / 100


@torch.no_grad()
def scored_in_float64(model):
    """By the definition, on states that were computed before."""
    tokens_BL, prompt_B, response_B = batch()
    log_BLV = model.lm_head(model.model.forward().last_hidden_state).log_softmax(-1)
    logprobs_BT = torch.zeros(len(tokens_BL), int(response_B.max()), dtype=torch.double)
    entropy_BT = torch.zeros_like(logprobs_BT)
    for i, (p, r) in enumerate(zip(prompt_B.tolist(), response_B.tolist(), strict=True)):
        for t in range(r):
            log_V = log_BLV[i, p + t - 1]
            logprobs_BT[i, t], entropy_BT[i, t] = log_V[tokens_BL[i, p + t]], -(log_V.exp() * log_V).sum()
    return logprobs_BT, entropy_BT


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_a_float32_projection_is_the_plain_one(tied):
    model = tiny_lm(tie_word_embeddings=tied)
    expected = gradients(model, loss_of(*scored(model, chunk_tokens=3)))
    found = gradients(model, loss_of(*scored(model, chunk_tokens=3, head_dtype="float32")))
    assert_close(found, expected, rtol=0, atol=0)
    low = tiny_lm(tie_word_embeddings=tied).bfloat16()
    assert all(g.dtype == torch.bfloat16 for g in gradients(low, loss_of(*scored(low, head_dtype="float32"))).values())


def test_compiled_scores_are_the_plain_ones():
    """Forward and backward, with all entropies, for chunks of several sizes: of one token, and of many."""
    for entropy in ("none", "measured", "trained"):
        model = tiny_lm()
        expected, found = (
            scored(model, None, 0.7, entropy, head=kind, chunk_tokens=6) for kind in ("plain", "compile")
        )
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found[1] is None or found[1].requires_grad == expected[1].requires_grad
        by = [gradients(model, scores.sum()) for scores, _ in (expected, found)]
        assert_close(by[1], by[0], rtol=1e-4, atol=1e-5)
    masked = [
        ScoringLM(model, head=kind, unused=[0, 28])(*batch(), 0.7, "trained", True) for kind in ("plain", "compile")
    ]
    assert bool(masked[0][0].isinf().any())  # the text has a 0
    assert_close(masked[1], masked[0], rtol=1e-5, atol=1e-5)


# ---- fused kernels


def reference(hidden_NH, weight_VH, targets_N, softcap):
    """Cross entropy of each token, as both packages document it."""
    assert hidden_NH.dtype == weight_VH.dtype  # kernels do not cast
    assert not torch.is_autocast_enabled("cpu")
    logits_NV = (hidden_NH @ weight_VH.T).float()
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins with the signatures of liger-kernel 0.8.5 and cut-cross-entropy 25.1.1; returns the calls of each."""
    calls = {"liger": [], "cce": []}

    def liger_fused_linear_cross_entropy(
        input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
        reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
        return_token_accuracy=False, return_predicted_tokens=False, chunk_mem_const=1,
    ):  # fmt: skip
        assert (reduction, bias, accum_dtype) == ("none", None, torch.float32)
        calls["liger"].append(input.dtype)
        return reference(input, weight, target, softcap)

    def linear_cross_entropy(
        e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
    ):
        assert (reduction, filter_eps, impl) == ("none", None, "cce")
        calls["cce"].append(e.dtype)
        return reference(e, c, targets, softcap)

    functional = types.SimpleNamespace(liger_fused_linear_cross_entropy=liger_fused_linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.SimpleNamespace(functional=functional))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setitem(
        sys.modules, "cut_cross_entropy", types.SimpleNamespace(linear_cross_entropy=linear_cross_entropy)
    )
    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    return calls


each = pytest.mark.parametrize("kind", ["liger", "cce"])


@each
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_fused_scores_are_the_plain_ones(kind, name, kernels):
    capped = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None} if name == "gemma2" else {}
    model = tiny_lm(name, attention="eager", **capped)
    expected, found = (scored(model, entropy="none", head=head)[0] for head in ("plain", kind))
    assert len(kernels[kind]) == 1
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_close(*(gradients(model, s.sum()) for s in (found, expected)), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize(("head_dtype", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_fused_kernels_get_the_type_of_the_projection(kind, head_dtype, expected, kernels):
    model = tiny_lm()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found, _ = scored(model, entropy="none", head=kind, head_dtype=head_dtype)
    assert kernels[kind] == [expected]
    assert found.dtype == torch.float32
    assert_close(found, scored(model)[0], rtol=0.1, atol=0.2)


@each
def test_a_fused_kernel_estimates_the_entropy_by_the_sampled_tokens(kind, kernels):
    model = tiny_lm()
    logprobs_BT, entropy_BT = scored(model, entropy="measured", head=kind)
    assert torch.equal(entropy_BT, -logprobs_BT)
    assert not entropy_BT.requires_grad
    tokens_BV, one_V = torch.full((29, 2), 3), torch.ones(29, dtype=torch.long)  # every token after the same one
    tokens_BV[:, 1] = torch.arange(29)
    estimate_V = scored(model, (tokens_BV, one_V, one_V), entropy="measured", head=kind)[1][:, 0]
    exact = plain(model, tokens_BV[:1], one_V[:1], one_V[:1])[1]
    assert_close((estimate_V * (-estimate_V).exp()).sum(), exact.squeeze())  # its mean over what is sampled


@each
@pytest.mark.parametrize(("temperature", "entropy"), [(0.7, "none"), (1.0, "trained")])
def test_what_a_fused_kernel_cannot_do_is_done_in_chunks(kind, temperature, entropy, kernels):
    model = tiny_lm()
    expected, found = (scored(model, None, temperature, entropy, head=head) for head in ("plain", kind))
    assert kernels[kind] == []
    assert_close(found, expected, rtol=0, atol=0)


@each
def test_a_mask_is_applied_in_chunks_where_a_fused_kernel_knows_none(kind, kernels):
    model, unused = tiny_lm(), [7, 28]
    expected, found = (ScoringLM(model, head=head, unused=unused)(*batch(), masked=True) for head in ("plain", kind))
    assert kernels[kind] == []
    assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found[0], scored(model)[0])


@each
def test_no_tokens_still_take_part_in_the_backward_pass(kind, kernels):
    """On a rank without any, gradients must be there for the others to be reduced with."""
    tokens_BL, prompt_B, _ = batch()
    scores, _ = scored(tiny_lm(), (tokens_BL, prompt_B, torch.zeros(5, dtype=torch.long)), entropy="none", head=kind)
    assert scores.shape == (5, 0)
    assert scores.requires_grad


def test_heads_that_cannot_be_fused_are_refused(kernels):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="Expected a linear vocabulary head without bias and adapters"):
        ScoringLM(peft.get_peft_model(tiny_lm(), config), head="liger")
    with pytest.raises(ValueError, match=r"Expected a linear layer as the vocabulary head with `loading\.head_dtype`"):
        ScoringLM(peft.get_peft_model(tiny_lm(), config), head_dtype="float32")
    model = tiny_lm()
    model.lm_head = torch.nn.Linear(16, 29)
    with pytest.raises(ValueError, match="without bias"):
        ScoringLM(model, head="cce")


@each
def test_a_missing_package_is_named(kind):
    with pytest.raises(ValueError, match=r'got none. Install it: pip install "prime-lightning\[fused\]"'):
        ScoringLM(tiny_lm(), head=kind)
