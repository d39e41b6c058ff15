"""The parts of `HFEngine`: drawing by inversion, and a cache that grows in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import DynamicCache, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from prime_lightning.engines import hf
from prime_lightning.engines.hf import BLOCK, GrownLayer, grown_cache, inverted


def by_scanning(weights, uniform):
    """Add one weight after another until the sum exceeds the target."""
    target, total = uniform * sum(weights), 0.0
    for i, weight in enumerate(weights):
        total += weight
        if total > target:
            return i
    raise AssertionError("a uniform number is below 1")


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=3 * BLOCK).filter(any),
    st.floats(0, 1, exclude_max=True, allow_subnormal=False).map(lambda u: round(u, 6) % 1),
)
def test_an_index_is_drawn_as_a_scan_finds_it(weights, uniform):
    drawn = inverted(torch.tensor([weights], dtype=torch.float), torch.tensor([uniform], dtype=torch.double))
    assert drawn.item() == by_scanning(weights, uniform)


def test_rows_are_drawn_apart_and_weight_zero_never():
    generator = torch.Generator().manual_seed(0)
    weights_RV = torch.rand(500, 5 * BLOCK + 17, generator=generator) ** 20
    weights_RV[torch.rand(weights_RV.shape, generator=generator) < 0.9] = 0.0
    uniform_R = torch.rand(500, generator=generator, dtype=torch.double)
    uniform_R[:20], uniform_R[20:40] = 0.0, 1 - 2.0**-53
    drawn_R = inverted(weights_RV, uniform_R)
    assert (weights_RV.gather(1, drawn_R[:, None]) > 0).all()
    scanned_R = torch.searchsorted(
        weights_RV.double().cumsum(1), uniform_R[:, None] * weights_RV.double().sum(1, keepdim=True), right=True
    ).squeeze(1)
    assert (drawn_R[40:] == scanned_R[40:]).all()


CONFIG = Qwen2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=9)


@given(st.lists(st.tuples(st.integers(1, 7), st.sampled_from([None, "half", "twice", "turned"])), max_size=9))
def test_a_grown_cache_is_the_concatenated_one(steps):
    chunk, hf.CHUNK = hf.CHUNK, 4
    try:
        caches, rows = (grown_cache(CONFIG), DynamicCache(config=CONFIG)), 2
        generator = torch.Generator().manual_seed(1)
        for length, change in steps:
            for layer in range(2):
                keys, values = torch.rand(2, rows, 2, length, 4, generator=generator)
                mine, plain = (cache.update(keys, values, layer) for cache in caches)
                assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
            kept = {"half": [rows - 1], "twice": [*range(rows)] * 2, "turned": [*range(rows)][::-1]}.get(change)
            if kept and len(kept) <= 16:
                rows = len(kept)
                for cache in caches:
                    cache.batch_select_indices(torch.tensor(kept))
            assert caches[0].get_seq_length() == caches[1].get_seq_length()
    finally:
        hf.CHUNK = chunk


def test_room_is_made_seldom_and_sliding_layers_stay():
    layer, rooms = GrownLayer(), set()
    for _ in range(300):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        rooms.add(layer.keys.data_ptr())
    assert len(rooms) == 3  # of 128 positions each
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    kinds = [type(layer).__name__ for layer in grown_cache(config).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "GrownLayer"]


@pytest.mark.parametrize("rows", [1, 3])
def test_one_pass_and_many_give_the_same_logits(rows):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(CONFIG).eval()
    tokens = torch.randint(0, 9, (rows, 150))
    cache = grown_cache(CONFIG)
    with torch.no_grad():
        steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(150)]
        assert_close(torch.cat(steps, 1), model(tokens).logits, rtol=1e-4, atol=1e-5)
