"""`HFEngine` against `transformers.generate` and `ScoringLM`, and what a sample may depend on."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from torch.testing import assert_close
from toys import prompt, tiny_lm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from prime_lightning.engines import Engine, hf
from prime_lightning.engines.hf import HFEngine
from prime_lightning.engines.samples import end_token_ids
from prime_lightning.models.batch import Batch
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.models.pretrained import save
from prime_lightning.rollout import Finish, Rollout, Sampling, Verdict

RAGGED = [prompt(draw, range(2, 3 + 2 * (draw % 5))) for draw in range(12)]
EVEN = [prompt(draw, [2 + draw, 5, 36]) for draw in range(12)]
shapes = pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])


def sample(engine, prompts, **sampling):
    """All completions by draw."""
    return {p.draw: completions for p, completions in engine.stream(prompts, Sampling(**sampling))}


def assert_same(one, other):
    """The same tokens, and log-probs up to the rounding of other shapes."""
    assert one.keys() == other.keys()
    for draw in one:
        for a, b in zip(one[draw], other[draw], strict=True):
            assert (a.token_ids, a.text, a.finish) == (b.token_ids, b.text, b.finish)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_it_is_an_engine(engine):
    assert isinstance(engine, Engine)


@shapes
def test_greedy_is_what_transformers_generates(engine, prompts, monkeypatch):
    ends = list(range(20, 26))  # many, so that some rows end early and leave the batch
    monkeypatch.setattr(engine, "end_ids", ends)
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": ends, "pad_token_id": 0}
    lengths = set()
    for p, [completion] in engine.stream(prompts, Sampling(samples=1, temperature=0, max_tokens=24)):
        generated = engine.model.generate(torch.tensor([p.token_ids]), **options)
        assert completion.token_ids == generated[0, len(p.token_ids) :].tolist()
        lengths.add(len(completion.token_ids))
    assert len(lengths) > 3


@shapes
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_that_training_computes(engine, prompts, temperature):
    sampling = Sampling(samples=3, max_tokens=20, temperature=temperature)
    groups = [
        [Rollout(prompt=p, completion=c, verdict=Verdict.of_score(1.0)) for c in completions]
        for p, completions in engine.stream(prompts, sampling)
    ]
    batch = Batch.of_groups(groups, temperature=temperature)
    scored_BT, _ = ScoringLM(engine.model)(
        batch.tokens_BL, batch.prompt_length_B, batch.response_length_B, batch.temperature
    )
    assert_close(batch.behaviour_logprobs_BT, scored_BT, rtol=1e-4, atol=1e-4)


def next_token_distribution(model, p, temperature, top_k, top_p):
    """The definition, in float64: sort, cut, renormalise."""
    shares = (model(torch.tensor([p.token_ids])).logits[0, -1].double() / temperature).softmax(-1)
    order = shares.argsort(descending=True)[: top_k or None]
    before = (shares[order] / shares[order].sum()).cumsum(0) - shares[order] / shares[order].sum()
    kept = order[before < top_p]
    return torch.zeros_like(shares).index_put((kept,), shares[kept] / shares[kept].sum())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 1), (0.7, 0, 1), (3, 5, 1), (3, 0, 0.8), (4, 9, 0.9)]
)
def test_draws_follow_the_distribution_that_they_report(engine, temperature, top_k, top_p):
    count = 4000
    for p in RAGGED[:3]:
        expected_V = next_token_distribution(engine.model, p, temperature, top_k, top_p)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        [drawn] = sample(engine, [p], samples=count, max_tokens=1, **options).values()
        for completion in drawn:
            [token] = completion.token_ids
            assert completion.logprobs[0] == pytest.approx(expected_V[token].log().item(), abs=1e-4)
        counts_V = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(expected_V)).double()
        usual = count * expected_V >= 5  # the rest is one class, as a chi-square test wants
        rest = torch.stack([counts_V[~usual].sum(), count * expected_V[~usual].sum()])
        seen = torch.cat([counts_V[usual], rest[:1]])
        wanted = torch.cat([count * expected_V[usual], rest[1:].clamp_min(1)])
        degrees = len(wanted) - 1
        assert ((seen - wanted) ** 2 / wanted).sum() < degrees + 5 * math.sqrt(2 * degrees)


def test_second_tokens_follow_their_distribution_too(engine):
    drawn = sample(engine, RAGGED[3:4], samples=3000, max_tokens=2, temperature=2.0)[3]
    first = max({c.token_ids[0] for c in drawn}, key=lambda i: sum(c.token_ids[0] == i for c in drawn))
    seconds = [c.token_ids[1] for c in drawn if c.token_ids[0] == first]
    expected_V = next_token_distribution(engine.model, prompt(0, [*RAGGED[3].token_ids, first]), 2.0, 0, 1.0)
    share_V = torch.bincount(torch.tensor(seconds), minlength=len(expected_V)) / len(seconds)
    assert (share_V - expected_V).abs().max() < 5 * math.sqrt(0.25 / len(seconds))


@shapes
def test_a_sample_depends_only_on_seed_draw_and_number(engine, prompts):
    together = sample(engine, prompts, samples=4, max_tokens=20, seed=5)
    alone = {}
    for p in reversed(prompts):
        alone |= sample(engine, [p], samples=4, max_tokens=20, seed=5)
    assert_same(together, alone)
    fewer = sample(engine, prompts, samples=2, max_tokens=20, seed=5)
    assert_same({draw: completions[:2] for draw, completions in together.items()}, fewer)
    shorter = sample(engine, prompts, samples=4, max_tokens=7, seed=5)
    for draw, completions in together.items():
        assert [c.token_ids[:7] for c in completions] == [c.token_ids for c in shorter[draw]]


def test_samples_differ_in_seed_draw_and_number(engine):
    twins = [prompt(draw, [2, 3, 4]) for draw in (0, 1)]
    texts = [
        completion.text
        for seed in (0, 1)
        for completions in sample(engine, twins, samples=4, max_tokens=30, temperature=3.0, seed=seed).values()
        for completion in completions
    ]
    assert len(set(texts)) == 16


@shapes
@pytest.mark.parametrize("share", [0.0, 1.1], ids=["never", "at every step"])
def test_leaving_of_finished_rows_changes_nothing(engine, prompts, share, monkeypatch):
    expected = sample(engine, prompts, samples=4, max_tokens=40, temperature=2.0)
    assert len({len(c.token_ids) for completions in expected.values() for c in completions}) > 5
    monkeypatch.setattr(hf, "COMPACT_BELOW", share)
    assert_same(sample(engine, prompts, samples=4, max_tokens=40, temperature=2.0), expected)


def test_ragged_prompts_equal_unpadded_ones_token_by_token(engine):
    drawn = sample(engine, RAGGED, samples=2, max_tokens=12)
    for p in RAGGED:
        for completion in drawn[p.draw]:
            tokens = [*p.token_ids, *completion.token_ids]
            log_LV = engine.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            places = range(len(p.token_ids) - 1, len(tokens) - 1)
            expected = [log_LV[i, tokens[i + 1]].item() for i in places]
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_ragged_prompts_suit_models_that_count_positions(tmp_path, engine):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    save(GPT2LMHeadModel(config), engine.tokenizer, tmp_path)  # learned positions: a shift changes the scores
    absolute = HFEngine(device="cpu")
    absolute.start(str(tmp_path))
    options = {"samples": 2, "max_tokens": 20, "temperature": 2.0}
    alone = {p.draw: completions for p in RAGGED for completions in sample(absolute, [p], **options).values()}
    assert_same(sample(absolute, RAGGED, **options), alone)


def test_finish_says_why_and_the_end_token_is_kept_but_not_shown(engine):
    finishes = set()
    drawn = sample(engine, RAGGED, samples=8, max_tokens=30, temperature=2.0)
    for completion in (c for completions in drawn.values() for c in completions):
        ended = completion.token_ids[-1] in engine.end_ids
        finishes.add(completion.finish)
        assert completion.finish is (Finish.STOP if ended else Finish.LENGTH)
        assert ended or len(completion.token_ids) == 30
        assert not any(token in engine.end_ids for token in completion.token_ids[:-1])
        assert "<eos>" not in completion.text
        assert len(completion.token_ids) == len(completion.logprobs) == len(completion.versions)
    assert finishes == set(Finish)


def test_an_end_token_at_the_limit_is_a_stop(engine):
    drawn = sample(engine, RAGGED, samples=8, max_tokens=30, temperature=2.0)
    draw, number, length = next(
        (draw, i, len(c.token_ids))
        for draw, completions in drawn.items()
        for i, c in enumerate(completions)
        if c.finish is Finish.STOP
    )
    again = sample(engine, RAGGED, samples=8, max_tokens=length, temperature=2.0)[draw][number]
    assert again.finish is Finish.STOP


def test_stop_strings_end_a_sample_and_change_nothing_before(engine):
    free = sample(engine, RAGGED, samples=4, max_tokens=30, temperature=2.0)
    pairs = [c.text[i : i + 2] for completions in free.values() for c in completions for i in range(len(c.text) - 1)]
    stop = (max(set(pairs), key=pairs.count), "5")
    stopped = sample(engine, RAGGED, samples=4, max_tokens=30, temperature=2.0, stop=stop)
    cut = 0
    for draw, completions in free.items():
        for c, s in zip(completions, stopped[draw], strict=True):
            ends = [i for i in range(len(c.text) + 1) if any(c.text[:i].endswith(word) for word in stop)]
            expected = c.text[: ends[0]] if ends else c.text
            assert s.text == expected
            assert s.token_ids == c.token_ids[: len(s.token_ids)]
            assert s.finish is (Finish.STOP if ends else c.finish)
            cut += bool(ends) and ends[0] < len(c.text)
    assert cut > 5


def cycling_model(folder, cycle):
    """A model that always says the next byte of `cycle`, with a byte-level tokenizer; token = byte + 1."""
    vocabulary = {"<eos>": 0, **{letter: byte + 1 for byte, letter in bytes_to_unicode().items()}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    n = len(cycle)
    model = tiny_lm("llama", vocab_size=257, eos_token_id=0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.get_input_embeddings().weight.zero_()
        model.lm_head.weight.zero_()
        for i, byte in enumerate(cycle):
            model.get_input_embeddings().weight[byte + 1, i] = 1
            model.lm_head.weight[cycle[(i + 1) % n] + 1, i] = 9
    model.save_pretrained(folder)


def test_stop_strings_may_take_several_tokens_a_character(tmp_path):
    cycle = "答案完".encode()  # nine bytes, nine tokens, three characters
    cycling_model(tmp_path, cycle)
    engine = HFEngine(device="cpu")
    engine.start(str(tmp_path))
    start = prompt(0, [cycle[-1] + 1])
    [[completion]] = sample(engine, [start], samples=1, temperature=0, max_tokens=20, stop=("答案完",)).values()
    assert (completion.text, completion.finish) == ("答案完", Finish.STOP)
    [[completion]] = sample(engine, [start], samples=1, temperature=0, max_tokens=20).values()
    assert (completion.text[:6], completion.finish) == ("答案完答案完", Finish.LENGTH)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_changes_nothing(engine, sharp_folder, batch_size):
    small = HFEngine(batch_size=batch_size, device="cpu")
    small.start(sharp_folder)
    assert_same(sample(small, RAGGED, samples=3, max_tokens=10), sample(engine, RAGGED, samples=3, max_tokens=10))


def test_it_can_be_closed_early_and_used_again(engine):
    expected = sample(engine, RAGGED, samples=4, max_tokens=10)
    stream = engine.stream(RAGGED, Sampling(samples=4, max_tokens=10))
    next(stream)
    assert not torch.is_inference_mode_enabled()  # between two items the trainer may compute gradients
    stream.close()
    assert torch.tensor(1.0, requires_grad=True).exp().requires_grad
    assert_same(sample(engine, RAGGED, samples=4, max_tokens=10), expected)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_sampled(engine):
    fits, long = prompt(0, [2] * 100), prompt(1, [2] * 101)
    assert len(sample(engine, [fits], samples=1, max_tokens=28)) == 1  # 128 positions
    with pytest.raises(ValueError, match="128 positions, got 101 prompt tokens and max_tokens 28"):
        next(engine.stream([fits, long], Sampling(samples=1, max_tokens=28)))


@pytest.mark.parametrize("tied", [False, True])
def test_load_weights_makes_it_the_other_model(tmp_path, engine, tied):
    model = tiny_lm(vocab_size=len(engine.tokenizer), tie_word_embeddings=tied)
    save(model, engine.tokenizer, tmp_path)
    engine = HFEngine(device="cpu")
    engine.start(str(tmp_path))
    before = sample(engine, RAGGED, samples=1, temperature=0, max_tokens=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 2)
    weights = dict(model.named_parameters())
    assert ("lm_head.weight" in weights) is not tied
    engine.load_weights(weights.items(), version=3)
    after = sample(engine, RAGGED, samples=1, temperature=0, max_tokens=10)
    assert after != before
    assert engine.version == 3
    for p in RAGGED:
        [completion] = after[p.draw]
        generated = model.generate(torch.tensor([p.token_ids]), do_sample=False, max_new_tokens=10)
        assert completion.token_ids == generated[0, len(p.token_ids) :].tolist()
        assert completion.versions == [3] * len(completion.token_ids)


def test_starting_again_forgets_the_trainers_weights(sharp_folder):
    engine = HFEngine(device="cpu")
    engine.start(sharp_folder)
    fresh = sample(engine, EVEN, samples=1, temperature=0, max_tokens=5)
    weights = [(name, torch.zeros_like(w)) for name, w in engine.model.named_parameters()]
    engine.load_weights(weights, version=7)
    engine.start(sharp_folder)
    assert engine.version == -1  # or nobody would send the weights again
    assert sample(engine, EVEN, samples=1, temperature=0, max_tokens=5) == fresh


def test_weights_of_another_model_are_refused(sharp_folder):
    engine = HFEngine(device="cpu")
    engine.start(sharp_folder)
    weights = {name: w.clone() for name, w in engine.model.named_parameters()}
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=r"'model.extra' with shape \(1,\) \(no such weight\)"):
        engine.load_weights([("model.extra", torch.zeros(1))], version=1)
    with pytest.raises(ValueError, match=rf"{name}' with shape \(2, 3\) \(shape \(32, 32\)\)"):
        engine.load_weights([(name, torch.zeros(2, 3))], version=1)
    del weights[name]
    with pytest.raises(ValueError, match=rf"got none for \['{name}'\]"):
        engine.load_weights(weights.items(), version=1)
    assert engine.version == -1


def test_sleep_wake_and_close_keep_it_usable(engine):
    expected = sample(engine, EVEN, samples=1, temperature=0, max_tokens=5)
    engine.sleep()
    engine.wake()
    engine.close()
    engine.close()
    assert sample(engine, EVEN, samples=1, temperature=0, max_tokens=5) == expected


def test_a_sleeping_engine_holds_no_weights_and_gets_new_ones(sharp_folder):
    engine = HFEngine(device="cpu")
    engine._can_sleep = True  # as on a GPU
    engine.start(sharp_folder)
    for parameter in engine.model.parameters():
        parameter.data = parameter.data.clone()  # memory of its own, not the file's
    engine.model.tie_weights()
    weights = {name: w.clone() for name, w in engine.model.named_parameters()}
    engine.load_weights(weights.items(), version=3)
    expected = sample(engine, EVEN, samples=1, temperature=0, max_tokens=5)
    engine.sleep()
    assert sum(p.untyped_storage().nbytes() for p in engine.model.parameters()) == 0
    assert engine.version == -1
    engine.wake()
    with pytest.raises(ValueError, match="`wake` and sync it"):
        sample(engine, EVEN, samples=1)
    engine.load_weights(weights.items(), version=3)
    assert sample(engine, EVEN, samples=1, temperature=0, max_tokens=5) == expected


def test_end_tokens_come_from_tokenizer_and_generation_config(engine):
    assert end_token_ids(engine.tokenizer, None) == [1]
    assert end_token_ids(engine.tokenizer, 5) == [1, 5]
    assert end_token_ids(engine.tokenizer, [7, 1]) == [1, 7]
    endless = PreTrainedTokenizerFast(tokenizer_object=engine.tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="with an end token"):
        end_token_ids(endless, None)


def test_finished_samples_that_are_kept_are_not_drawn_again(engine):
    options = Sampling(samples=4, max_tokens=24, seed=2)
    engine_ends, engine.end_ids = engine.end_ids, list(range(20, 26))  # many, so that samples end early
    try:
        undisturbed = {p.draw: group for p, group in engine.stream(RAGGED, options)}
        kept = {}
        stream = engine.stream(RAGGED, options, kept)
        first, _ = next(stream)
        stream.close()
        assert first.draw not in kept
        left = {(draw, k): sample for draw, group in kept.items() for k, sample in group.items()}
        assert 4 < len(left) < 4 * len(RAGGED)
        rest = {p.draw: group for p, group in engine.stream([p for p in RAGGED if p is not first], options, kept)}
    finally:
        engine.end_ids = engine_ends
    assert kept == {}
    assert all(rest[draw][k] is sample for (draw, k), sample in left.items())  # the very objects
    assert_same(rest, {draw: group for draw, group in undisturbed.items() if draw != first.draw})
