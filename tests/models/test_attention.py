"""`varlen` attention against a mask over all tokens, and packed models against rows that are alone."""

import inspect
import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logprobs import batch, gradients, loss_of, plain, scored
from torch.nn.attention.varlen import varlen_attn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from toys import CLASSES, tiny_lm
from transformers import AttentionInterface

from prime_lightning.models import attention
from prime_lightning.models.attention import Sequences, pack
from prime_lightning.models.logprobs import ScoringLM, ValueLM
from prime_lightning.models.options import Loading

WINDOWED = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen2-windowed": {"use_sliding_window": True, **WINDOWED},
    "mistral": {"sliding_window": 2},
    "gemma2": {"attn_logit_softcapping": None, **WINDOWED},
    "gemma3": WINDOWED,
    "gpt_neox": {},
}
models = pytest.mark.parametrize("name", MODELS)


def model_of(name, kind, **options):
    return tiny_lm(name.split("-")[0], attention=kind, **MODELS[name], **options)


def slow(query_XHD, key_YHD, value_YHD, rows, scale, window):
    """The definition, with one mask over all tokens."""
    owner_X = torch.arange(len(rows.queries)).repeat_interleave(torch.tensor(rows.queries))
    owner_Y = torch.arange(len(rows.keys)).repeat_interleave(torch.tensor(rows.keys))
    place_X = torch.cat([torch.arange(k - q, k) for q, k in zip(rows.queries, rows.keys, strict=True)])
    place_Y = torch.cat([torch.arange(k) for k in rows.keys])
    seen_XY = (owner_X[:, None] == owner_Y) & (place_Y <= place_X[:, None])
    if window is not None:
        seen_XY &= place_Y > place_X[:, None] - window
    groups = query_XHD.shape[1] // key_YHD.shape[1]
    key_YHD, value_YHD = (x.repeat_interleave(groups, 1) for x in (key_YHD, value_YHD))
    scale = scale or 1 / math.sqrt(query_XHD.shape[-1])
    weight_HXY = (torch.einsum("xhd,yhd->hxy", query_XHD, key_YHD) * scale).masked_fill(~seen_XY, -math.inf)
    return torch.einsum("hxy,yhd->xhd", weight_HXY.softmax(-1), value_YHD)


def rows_of(queries, keys):
    starts = [attention.Sequences.of(tuple(lengths)).query_starts for lengths in (queries, keys)]
    return Sequences(tuple(queries), tuple(keys), *starts)


@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    window=st.sampled_from([None, 1, 2, 4, 100]),
    scale=st.sampled_from([None, 0.3]),
    block=st.sampled_from([1, 2, 512]),
    seed=st.integers(0, 9),
)
def test_one_by_one_is_attention_by_its_definition(lengths, heads, window, scale, block, seed):
    rows = rows_of([q for q, _ in lengths], [q + before for q, before in lengths])
    generator = torch.Generator().manual_seed(seed)

    def made(tokens, heads):
        return torch.randn(tokens, heads, 4, generator=generator, requires_grad=True)

    given_ = [made(sum(rows.queries), heads[0]), made(sum(rows.keys), heads[1]), made(sum(rows.keys), heads[1])]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        for way in (slow, attention.one_by_one):
            out_XHD = way(*given_, rows, scale, window)
            weight_XHD = torch.linspace(-1, 1, out_XHD.numel()).view_as(out_XHD)
            found[way] = [out_XHD, *torch.autograd.grad((weight_XHD * out_XHD).sum(), given_)]
    assert_close(*found.values(), rtol=1e-4, atol=1e-5)


@models
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_models_are_the_plain_ones(name, checkpointing):
    expected_model = model_of(name, "eager")
    expected = plain(expected_model, *batch(), 0.7)
    model = model_of(name, "varlen").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    scores = scored(model, batch(garbage=7), 0.7, packed=True, chunk_tokens=3)
    assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert_close(
        gradients(model, loss_of(*scores)),
        gradients(expected_model, loss_of(*expected)),
        rtol=1e-3,
        atol=1e-3,
    )


def test_windows_and_lengths_matter_to_these_models():
    """Or the test above would show nothing."""
    with_windows = plain(model_of("mistral", "eager"), *batch())
    without = plain(tiny_lm("mistral", attention="eager", sliding_window=None), *batch())
    assert (with_windows[0] - without[0]).abs().max() > 0.01


@models
def test_values_of_packed_rows_are_those_of_padded_ones(name):
    critics = [ValueLM(model_of(name, kind), packed=kind == "varlen") for kind in ("eager", "varlen")]
    for critic in critics:
        torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    assert_close(critics[0](*batch())[0], critics[1](*batch())[0], rtol=1e-4, atol=1e-4)


def test_autocast_does_not_mix_types():
    model = tiny_lm("llama", attention="varlen")
    seen = []
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        patch.setattr(attention, "one_by_one", lambda *a: seen.append(a[:3]) or a[0])
        ScoringLM(model, packed=True)(*batch())
    assert {x.dtype for qkv in seen for x in qkv} == {torch.bfloat16}


class Counting(TorchDispatchMode):
    """The largest tensor that was made, and how often the host waited for a number of the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "item", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.largest, self.waits = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.waits += any(word in name for word in self.WAITS)
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.numel())
        return out


def long_batch(rows=8, prompt=20, response=108):
    tokens = torch.randint(2, 29, (rows, prompt + response), generator=torch.Generator().manual_seed(0))
    return tokens, torch.full((rows,), prompt), torch.full((rows,), response)


@pytest.mark.parametrize("window", [None, 16])
def test_no_tensor_of_all_tokens_squared_is_made(window):
    """1,024 tokens: a mask over them would have 1,048,576 elements."""
    largest = {}
    for kind in ("varlen", "sdpa"):
        model = tiny_lm("mistral", attention=kind, sliding_window=window, max_position_embeddings=128).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        scoring = ScoringLM(model, packed=True, chunk_tokens=64)
        with Counting() as counted:
            scoring(*long_batch())[0].sum().backward()
        largest[kind] = counted.largest
    assert largest["varlen"] <= 1024 * 24  # tokens x the MLP's width
    assert largest["sdpa"] >= 1024**2  # or nothing was counted


@pytest.mark.parametrize("name", ["llama", "qwen2-windowed"])
def test_the_host_waits_once_a_forward_and_not_in_each_layer(name):
    waits = set()
    for layers in (2, 6):
        more = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if "windowed" in name else {}
        model = tiny_lm(name.split("-")[0], attention="varlen", num_hidden_layers=layers, **MODELS[name] | more)
        with Counting() as counted:
            ScoringLM(model, packed=True)(*batch())[0].sum().backward()
        waits.add(counted.waits)
    assert len(waits) == 1


# ---- prompts that are run once for all of their responses


def shared_batch(prompts=(0, 1, 0, 2, 0, 1, 0), responses=(4, 6, 1, 3, 0, 2, 5), *, garbage=0):
    """Rows of three prompts of 5, 2 and 7 tokens, not in order, of which the third begins with the second."""
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(2, 29, (n,), generator=generator) for n in (5, 2, 7)]
    texts[2][:2] = texts[1]
    length = [len(texts[p]) + r for p, r in zip(prompts, responses, strict=True)]
    tokens = torch.full((len(prompts), max(length)), garbage)
    for i, p in enumerate(prompts):
        tail = torch.randint(2, 29, (responses[i],), generator=generator)
        tokens[i, : length[i]] = torch.cat([texts[p], tail])
    return tokens, torch.tensor([len(texts[p]) for p in prompts]), torch.tensor(responses)


@models
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prompts_change_no_number_and_no_gradient(name, checkpointing):
    rows = shared_batch(garbage=7)
    expected_model, model = model_of(name, "eager"), model_of(name, "varlen").train()
    expected = plain(expected_model, *rows, 0.7)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    scores = scored(model, rows, 0.7, packed=True, shared_prompts=True, chunk_tokens=3)
    assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    found = gradients(model, loss_of(*scores))
    assert_close(found, gradients(expected_model, loss_of(*expected)), rtol=1e-3, atol=1e-3)


@models
def test_the_kernel_gets_shared_prompts_as_longer_keys(name, stand_in):
    expected = plain(model_of(name, "eager"), *shared_batch())
    scores = scored(model_of(name, "varlen"), shared_batch(), packed=True, shared_prompts=True)
    assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert stand_in[0]["cu_seq_k"].diff().tolist() == [9, 8, 6, 10, 4, 10]  # the row without a response asks nothing
    assert stand_in[0]["cu_seq_q"].diff().tolist() == [9, 8, 1, 10, 2, 5]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=8))
def test_any_mixture_of_prompts_may_be_shared(rows):
    given_ = shared_batch(*zip(*rows, strict=True))
    model = tiny_lm("llama", attention="varlen")
    apart, shared = (scored(model, given_, packed=True, shared_prompts=on) for on in (False, True))
    assert_close(apart, shared, rtol=1e-4, atol=1e-4)


def test_values_with_shared_prompts_are_those_without():
    critics = [ValueLM(tiny_lm("llama", attention="varlen"), packed=True, shared_prompts=on) for on in (False, True)]
    for critic in critics:
        torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    assert_close(critics[0](*shared_batch())[0], critics[1](*shared_batch())[0], rtol=1e-4, atol=1e-4)


def test_a_shared_prompt_is_computed_once():
    model, seen = tiny_lm("llama", attention="varlen"), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape[1]))
    rows = shared_batch()
    for shared in (False, True):
        ScoringLM(model, packed=True, shared_prompts=shared)(*rows)
    assert seen == [4 * 5 + 2 * 2 + 7 + 21, 5 + 2 + 7 + 21]  # K (P + T) and P + K T, summed over the prompts


def test_shared_prompts_follow_the_attention():
    assert Loading(attention="varlen", packed=True).scoring["shared_prompts"]
    assert not Loading(attention="varlen", packed=True, shared_prompts="off").scoring["shared_prompts"]
    assert not Loading(packed=True).scoring["shared_prompts"]
    with pytest.raises(ValueError, match=r"Expected `loading.attention: varlen` with `loading.shared_prompts: on`"):
        Loading(packed=True, shared_prompts="on")


# ---- the way over torch's kernel, which needs a GPU: here with a stand-in that takes what the kernel takes


@pytest.fixture
def stand_in(monkeypatch):
    """Calls with the signature of torch's function, computed by the definition."""
    calls, signature = [], inspect.signature(varlen_attn)

    def kernel(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        said = bound.arguments
        calls.append(said)
        starts_q, starts_k = said["cu_seq_q"], said["cu_seq_k"]
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert type(said["max_q"]) is type(said["max_k"]) is int
        rows = rows_of(starts_q.diff().tolist(), starts_k.diff().tolist())
        assert (said["max_q"], said["max_k"]) == (max(rows.queries), max(rows.keys))
        left, right = said["window_size"]
        assert right == 0  # causal, and by its last key where there are more keys than queries
        assert said["enable_gqa"] == (said["query"].shape[1] != said["key"].shape[1])
        window = None if left == -1 else left + 1
        return slow(said["query"], said["key"], said["value"], rows, said["scale"], window)

    monkeypatch.setattr(attention, "fits_flash", lambda *tensors: True)
    monkeypatch.setattr(attention, "varlen_of_torch", lambda: kernel)
    return calls


@models
def test_the_kernel_gets_what_it_takes(name, stand_in):
    expected = plain(model_of(name, "eager"), *batch())
    model = model_of(name, "varlen")
    assert_close(scored(model, packed=True), expected, rtol=1e-4, atol=1e-4)
    assert len(stand_in) == model.config.num_hidden_layers
    assert all(call["cu_seq_q"] is stand_in[0]["cu_seq_q"] for call in stand_in)  # made once


def test_torch_s_own_function_runs_forward_and_backward_on_tensors_without_numbers(monkeypatch):
    """Its registered shapes and derivatives: what it is called with, it takes."""
    monkeypatch.setattr(attention, "fits_flash", lambda *tensors: True)
    monkeypatch.setattr(attention, "one_by_one", None)
    query, key, value = (
        torch.empty(1, heads, 10, 8, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
    )
    rows = Sequences.of((4, 6), torch.device("meta"))
    out, _ = attention.varlen(torch.nn.Identity(), query, key, value, None, sequences=rows, sliding_window=3)
    assert out.shape == (1, 10, 4, 8)
    grads = torch.autograd.grad(out.float().sum(), (query, key, value))
    assert [g.shape for g in grads] == [x.shape for x in (query, key, value)]


def test_torch_s_own_function_is_taken_where_it_is_complete(monkeypatch):
    def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...

    find = attention.varlen_of_torch.__wrapped__
    assert find() is varlen_attn
    old = types.ModuleType("varlen")
    old.varlen_attn = of_torch_2_10
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", old)
    assert find() is None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # torch 2.9: the import fails
    assert find() is None


@pytest.mark.parametrize("tensor", [torch.ones(2, 1, 8), torch.ones(2, 1, 8, dtype=torch.bfloat16)])
def test_a_cpu_has_no_kernel(tensor):
    assert not attention.fits_flash(tensor, tensor)


def test_flash_attention_by_name_gets_its_lengths_once(monkeypatch):
    calls = []

    def flash(module, query, key, value, mask, **options):
        calls.append(options)
        return query.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_stand_in", flash)
    model = tiny_lm()
    model.config._attn_implementation = "flash_stand_in"
    ScoringLM(model, packed=True)(*batch())
    assert len(calls) == 2
    for call in calls:
        assert call["cu_seq_lens_q"].tolist() == call["cu_seq_lens_k"].tolist() == [0, 7, 14, 20, 22, 29]
        assert call["cu_seq_lens_q"] is calls[0]["cu_seq_lens_q"]
        assert call["max_length_q"] == call["max_length_k"] == 7
        assert type(call["max_length_q"]) is int


def test_packing_is_the_rows_one_behind_another():
    tokens_BL, prompt_B, response_B = batch(garbage=7)
    packed = pack(tokens_BL, prompt_B + response_B)
    lengths = (prompt_B + response_B).tolist()
    rows = [tokens_BL[i, :n].tolist() for i, n in enumerate(lengths)]
    assert packed.tokens_X.tolist() == [token for row in rows for token in row]
    assert packed.positions_X.tolist() == [i for n in lengths for i in range(n)]
    assert [packed.tokens_X[packed.place_BL[i, :n]].tolist() for i, n in enumerate(lengths)] == rows
    assert packed.sequences.queries == packed.sequences.keys == tuple(lengths)


def test_every_model_here_is_known():
    assert {name.split("-")[0] for name in MODELS} == CLASSES.keys()


# ---- sampling: one query a row


@settings(deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)]),
    positions=st.integers(1, 9),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 9),
)
def test_heads_that_share_keys_are_queries_of_them(rows, heads, positions, masked, scale, seed):
    torch.manual_seed(seed)
    query = torch.randn(rows, heads[0], 1, 4)
    key, value = torch.randn(2, rows, heads[1], positions, 4)
    seen = torch.rand(rows, 1, 1, positions) < 0.5
    seen[..., -1] = True
    out, _ = attention.grouped(torch.nn.Identity(), query, key, value, seen if masked else None, scaling=scale)
    for row in range(rows):
        for head in range(heads[0]):
            own = head // (heads[0] // heads[1])
            scores = key[row, own] @ query[row, head, 0] * (scale or 0.5)
            weights = scores.masked_fill(~seen[row, 0, 0], -math.inf) if masked else scores
            assert_close(out[row, 0, head], weights.softmax(-1) @ value[row, own])


@models
def test_a_token_behind_a_cache_gets_the_logits_of_plain_attention(name):
    tokens = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 5, 4, 3]])
    seen = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    found = []
    for kind in ("eager", attention.GROUPED):
        model = model_of(name, "eager").eval()
        model.set_attn_implementation(kind)
        cache = model(tokens, attention_mask=seen[:, :5], use_cache=True).past_key_values
        for step in (5, 6):
            position = seen[:, : step + 1].sum(1, keepdim=True) - 1
            given = {"attention_mask": seen[:, : step + 1], "position_ids": position, "past_key_values": cache}
            found.append(model(torch.tensor([[6], [2]]), use_cache=True, **given).logits)
    for eager, ours in zip(found[:2], found[2:], strict=True):
        assert_close(ours, eager)
