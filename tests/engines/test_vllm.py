"""The vLLM engine on CPU with real vLLM, against `engines/hf.py`. One engine serves the whole file."""

import os
import signal
import threading
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from prime_lightning.engines import Engine, check_truncated_logprobs
from prime_lightning.engines.hf import HFEngine, truncate
from prime_lightning.engines.vllm.arguments import CPU_ARGUMENTS
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.models.lora import merged_parameters, with_adapters
from prime_lightning.models.options import Lora
from prime_lightning.models.pretrained import load_causal_lm, load_tokenizer
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, write_model
from prime_lightning.rollout import Completion, Finish, Prompt, Sampling

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")

SAMPLING = Sampling(samples=4, max_tokens=24, temperature=1.0, seed=3)
GREEDY = Sampling(samples=1, max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(write_model(tmp_path_factory.mktemp("model"), hidden_size=128))  # heads of 32 numbers


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[VLLMEngine]:
    made = VLLMEngine(device="cpu", max_sequences=64, restarts=5)
    made.start(model)
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts(model: str) -> list[Prompt]:
    tokenizer, source = load_tokenizer(model), ArithmeticPrompts(seed=5, operations=6)
    return [source.prompt(draw, tokenizer) for draw in range(24)]


def weights(model: str, noise: int = 0, scale: float = 0.03) -> list[tuple[str, torch.Tensor]]:
    """Weights of the model, moved `noise` random steps."""
    lm = load_causal_lm(model)
    torch.manual_seed(noise)
    moved = [(name, p.detach().clone()) for name, p in lm.named_parameters()]
    return [(name, p + scale * torch.randn_like(p) * (noise > 0)) for name, p in moved]


def collect(engine: Engine, prompts: list[Prompt], sampling: Sampling) -> dict[int, list[Completion]]:
    return {prompt.draw: group for prompt, group in engine.stream(prompts, sampling)}


def largest_gap(model: str, named: list, prompts: list[Prompt], groups: dict, sampling: Sampling) -> float:
    """Largest |log-prob by the engine - by one forward pass over the whole sequence|."""
    lm = load_causal_lm(model).eval()
    lm.load_state_dict(dict(named), strict=False)
    gap = 0.0
    for prompt in prompts:
        for completion in groups[prompt.draw]:
            tokens = torch.tensor([*prompt.token_ids, *completion.token_ids])
            with torch.no_grad():
                logits = lm(tokens[None]).logits[0, len(prompt.token_ids) - 1 : -1]
            if sampling.temperature:
                logits = truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p)
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            gap = max(gap, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    return gap


def test_greedy_tokens_and_logprobs_equal_the_hf_engine_over_weight_updates(engine, model, prompts):
    """Also behind prompts of more than one block, whose keys and values are cached and belong to the old weights."""
    hf = HFEngine()
    hf.start(model)
    tokenizer, source = load_tokenizer(model), ArithmeticPrompts(seed=6, operations=36)
    prompts = prompts + [source.prompt(draw, tokenizer) for draw in range(100, 104)]
    assert len(prompts[-1].token_ids) > 2 * CPU_ARGUMENTS["block_size"]
    for version in range(4):  # the first without having seen an update of other numbers, then three
        named = weights(model, noise=version)
        engine.load_weights(iter(named), version)
        hf.load_weights(named, version)
        mine, theirs = collect(engine, prompts, GREEDY), collect(hf, prompts, GREEDY)
        assert {d: g[0].token_ids for d, g in mine.items()} == {d: g[0].token_ids for d, g in theirs.items()}
        assert {v for g in mine.values() for v in g[0].versions} == {version} == {engine.version}
        assert largest_gap(model, named, prompts, mine, GREEDY) < 1e-4
        for sampling in (SAMPLING, Sampling(samples=2, max_tokens=24, temperature=0.7, top_p=0.9, top_k=20)):
            assert largest_gap(model, named, prompts, collect(engine, prompts, sampling), sampling) < 1e-4


def test_weights_of_another_number_format_are_converted(engine, model, prompts):
    named = [(name, p.bfloat16()) for name, p in weights(model, noise=1)]
    engine.load_weights(named, 5)
    groups = collect(engine, prompts, GREEDY)
    assert largest_gap(model, [(n, p.float()) for n, p in named], prompts, groups, GREEDY) < 1e-4


def test_a_group_has_its_samples_finish_reasons_and_text(engine, model, prompts):
    engine.load_weights(weights(model), 0)
    tokenizer = load_tokenizer(model)
    groups = collect(engine, prompts, SAMPLING)
    assert sorted(groups) == [prompt.draw for prompt in prompts]
    for completion in (c for group in groups.values() for c in group):
        assert len(completion.token_ids) == len(completion.logprobs) == len(completion.versions)
        ended = completion.token_ids[-1] == tokenizer.eos_token_id
        assert completion.finish is (Finish.STOP if ended else Finish.LENGTH)
        assert ended or len(completion.token_ids) == SAMPLING.max_tokens
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert all(len({tuple(c.token_ids) for c in group}) > 1 for group in groups.values())


def test_a_stop_string_ends_a_completion_and_stays_in_it(engine, model, prompts):
    sampling = Sampling(samples=4, max_tokens=60, stop=(";", "zz"), seed=1)
    groups = collect(engine, prompts, sampling)
    stopped = [c for group in groups.values() for c in group if ";" in c.text]
    assert len(stopped) > 20
    assert all(c.text.endswith(";") and c.text.count(";") == 1 and c.finish is Finish.STOP for c in stopped)


def test_samples_repeat_whatever_else_is_in_the_batch(engine, model, prompts):
    engine.load_weights(weights(model, noise=2), 1)
    together = collect(engine, prompts, SAMPLING)
    engine.max_sequences = 3  # a window of six samples
    apart = collect(engine, prompts[5:9], SAMPLING)
    engine.max_sequences = 64
    for draw, group in apart.items():
        assert [c.token_ids for c in group] == [c.token_ids for c in together[draw]]
    other = collect(engine, prompts[5:9], Sampling(samples=4, max_tokens=24, seed=4))
    assert [c.token_ids for c in other[5]] != [c.token_ids for c in together[5]]


def test_closing_a_stream_aborts_the_rest(engine, prompts):
    stream = engine.stream(prompts * 4, Sampling(samples=4, max_tokens=60))
    next(stream)
    assert engine.process.call("unfinished") > 0
    stream.close()
    assert engine.process.call("unfinished") == 0
    assert len(collect(engine, prompts, SAMPLING)) == len(prompts)


def test_finished_samples_that_are_kept_are_not_drawn_again(engine, model, prompts):
    engine.load_weights(weights(model, noise=2), 1)
    undisturbed = collect(engine, prompts, SAMPLING)
    kept: dict[int, dict[int, Completion]] = {}
    engine.max_sequences = 6
    stream = engine.stream(prompts, SAMPLING, kept)
    begun = [next(stream)[0] for _ in range(2)]
    stream.close()
    left = {(draw, k): sample for draw, group in kept.items() for k, sample in group.items()}
    rest = [prompt for prompt in prompts if prompt not in begun]
    again = {prompt.draw: group for prompt, group in engine.stream(rest, SAMPLING, kept)}
    engine.max_sequences = 64
    assert left
    assert not kept
    assert all(again[draw][k] is sample for (draw, k), sample in left.items())
    for draw, group in again.items():
        assert [c.token_ids for c in group] == [c.token_ids for c in undisturbed[draw]]


def test_samples_without_seeds_are_never_kept(engine, prompts):
    """Drawn again they would be others, and keeping the short ones would favour them."""
    engine.seeded = False
    kept: dict[int, dict[int, Completion]] = {}
    stream = engine.stream(prompts, SAMPLING, kept)
    next(stream)
    stream.close()
    engine.seeded = True
    assert kept == {}


def test_adapters_arrive_merged(engine, model, prompts):
    pytest.importorskip("peft")
    adapted = with_adapters(load_causal_lm(model), Lora(rank=4, alpha=8.0), 0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    engine.load_weights(merged_parameters(adapted), 2)
    lm = adapted.eval()
    for prompt, (done,) in engine.stream(prompts, GREEDY):
        with torch.no_grad():
            logits = lm(torch.tensor([[*prompt.token_ids, *done.token_ids]])).logits[0, len(prompt.token_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == done.token_ids
        expected = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)


def test_logprobs_know_of_top_p(engine, prompts):
    check_truncated_logprobs(engine, prompts[0], Sampling(top_p=0.9, max_tokens=24))
    check_truncated_logprobs(engine, prompts[1], Sampling(top_k=5, temperature=0.7, max_tokens=24))


def test_two_streams_at_a_time_do_not_mix(engine, prompts):
    first, second = engine.stream(prompts[:6], SAMPLING), engine.stream(prompts[6:12], SAMPLING)
    seen: tuple[list[int], list[int]] = ([], [])
    for (mine, _), (theirs, _) in zip(first, second, strict=True):
        seen[0].append(mine.draw)
        seen[1].append(theirs.draw)
    assert sorted(seen[0]) == [*range(6)]
    assert sorted(seen[1]) == [*range(6, 12)]


def test_an_update_amid_sampling_is_told_token_by_token(engine, model, prompts):
    """As in asynchronous training: another thread sends weights while samples are in flight."""
    engine.load_weights(weights(model), 7)
    sync = threading.Thread(target=engine.load_weights, args=(weights(model, noise=3), 8))
    stream = engine.stream(prompts * 3, Sampling(samples=4, max_tokens=90, seed=2))
    groups = [next(stream)[1]]
    sync.start()
    groups += [group for _, group in stream]
    sync.join()
    versions = [c.versions for group in groups for c in group]
    assert len(groups) == 3 * len(prompts)
    assert {v for run in versions for v in run} == {7, 8}
    assert all(run == sorted(run) for run in versions)
    assert any(len(set(run)) == 2 for run in versions)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda named: named[:-1], "got none for"),
        (lambda named: [("nobody.weight", named[0][1]), *named], "no such weight"),
        (lambda named: [(named[0][0], named[0][1][:3]), *named[1:]], r"shape \(3, 128\)"),
    ],
)
def test_wrong_weights_are_refused_and_change_nothing(engine, model, prompts, spoil, message):
    engine.load_weights(weights(model), 2)
    before = collect(engine, prompts[:4], GREEDY)
    with pytest.raises(ValueError, match=message):
        engine.load_weights(spoil(weights(model, noise=4)), 3)
    assert engine.version == 2
    assert collect(engine, prompts[:4], GREEDY) == before


def test_stale_weights_are_noticed(engine, model):
    """What the engine computes with is compared with what was sent: here the copy is changed behind its back."""
    engine.load_weights(weights(model), 2)
    engine.copy.tensors["lm_head.weight"].add_(0.001)
    columns = engine.copy.columns()
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < set(columns)
    read = engine.process.call("read_back", columns=columns)
    assert set(read) == set(columns)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight.*rubbish"):
        engine.copy.compare(columns, read)


def test_every_weight_can_be_read_back(engine, model):
    engine.load_weights(weights(model, noise=5), 2)
    columns = {name: 1 % shape[-1] for name, shape in engine.copy.shapes.items()}
    read = engine.process.call("read_back", columns=columns)
    assert set(read) == set(columns)
    engine.copy.compare(columns, read)


def test_a_prompt_that_is_too_long_is_refused(engine, prompts):
    assert engine.context == 128
    assert VLLMEngine().context is None  # it was not started
    with pytest.raises(ValueError, match=r"fit the model's 128 positions.*Lower `max_tokens`"):
        next(engine.stream(prompts, Sampling(max_tokens=128)))


def test_a_killed_engine_comes_back_and_nothing_is_lost_or_doubled(engine, model, prompts):
    engine.load_weights(weights(model, noise=6), 4)
    undisturbed = collect(engine, prompts * 2, SAMPLING)
    dead, stream = engine.process, engine.stream(prompts * 2, SAMPLING)
    groups = [next(stream)]
    os.kill(dead.process.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match=r"started again with the weights of version 4 \(death 1 of 5"):
        groups += stream
    assert sorted(prompt.draw for prompt, _ in groups) == sorted([*range(24)] * 2)
    for prompt, group in groups:
        assert [c.token_ids for c in group] == [c.token_ids for c in undisturbed[prompt.draw]]
        assert {v for c in group for v in c.versions} == {4}
    assert engine.process is not dead
    assert not dead.folder.exists()


def test_a_hanging_engine_is_replaced_during_a_sync(engine, model, prompts):
    named = weights(model, noise=7)
    os.kill(engine.process.process.pid, signal.SIGSTOP)
    engine.process.stall = 2.0
    with pytest.warns(UserWarning, match="did not answer `start_weight_update` in 2 s"):
        engine.load_weights(named, 9)
    assert engine.version == 9
    assert largest_gap(model, named, prompts, collect(engine, prompts, GREEDY), GREEDY) < 1e-4


def test_an_engine_that_dies_too_often_ends_the_run(engine, prompts):
    """With an OSError, which the command prints without a traceback."""
    engine.restarts = engine.deaths
    stream = engine.stream(prompts, SAMPLING)
    os.kill(engine.process.process.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"died \(killed from outside; where memory runs out, the kernel does that"):
        list(stream)
