"""One vLLM engine that two ranks share, with real vLLM over two processes on a CPU; what needs no ranks is below."""

import json
import os
import signal
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import launching
import pytest
import shared_ranks
import torch

from prime_lightning.engines.hf import HFEngine
from prime_lightning.engines.samples import EngineDiedError
from prime_lightning.engines.vllm.arguments import environment_of
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.engines.vllm.remote import OwnerClient, share
from prime_lightning.engines.vllm.shared import SharedVLLMEngine
from prime_lightning.prompts.arithmetic import write_model
from prime_lightning.rollout import Prompt

with_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")


def visit(model: str, folder, victim: int = -1, world: int = 2) -> dict[int, dict]:
    """Run the ranks; what each of those found that lived to say it."""
    arguments = model, str(folder), str(victim)
    codes, said = launching.launch(shared_ranks.__file__, folder, *arguments, seconds=400, world=world)
    alive = [rank for rank in range(world) if rank != victim]
    assert all(codes[rank] == 0 for rank in alive), "\n".join(text[-4000:] for text in said)
    return {rank: json.loads((folder / f"rank{rank}.json").read_text()) for rank in alive}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model"), hidden_size=128))  # four heads of 32 numbers


@pytest.fixture(scope="module")
def ranks(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    return visit(model, tmp_path_factory.mktemp("ranks"))


def equal(ours: dict[str, list[dict]], hf: HFEngine, prompts: list[Prompt]) -> None:
    """Greedy samples of these prompts are those of the other engine, with its log-probs."""
    assert set(ours) == {str(prompt.draw) for prompt in prompts}
    for draw, (theirs,) in shared_ranks.samples(hf.stream(prompts, shared_ranks.GREEDY)).items():
        (mine,) = ours[str(draw)]
        assert mine["token_ids"] == theirs["token_ids"]
        assert set(mine["versions"]) == {hf.version}
        expected = torch.tensor(theirs["logprobs"])
        torch.testing.assert_close(torch.tensor(mine["logprobs"]), expected, atol=1e-4, rtol=0)


@with_vllm
@pytest.mark.timeout(600)
def test_both_ranks_sample_what_the_hf_engine_does_over_weight_updates(ranks, model):
    hf = HFEngine()
    hf.start(model)
    for version in range(2):
        hf.load_weights(shared_ranks.weights(model, version), version)
        for rank, found in ranks.items():
            equal(found[f"greedy{version}"], hf, shared_ranks.prompts_of(rank, model))


@with_vllm
@pytest.mark.timeout(600)
def test_four_ranks_share_two_engines(model, tmp_path):
    hf = HFEngine()
    hf.start(model)
    hf.load_weights(shared_ranks.weights(model, 0), 0)
    ranks = visit(model, tmp_path, world=4)
    assert [found["owner"] for found in ranks.values()] == [0, 0, 2, 2]
    assert ranks[1]["pid"] != ranks[3]["pid"]
    for rank, found in ranks.items():
        equal(found["greedy0"], hf, shared_ranks.prompts_of(rank, model, 4))


@with_vllm
def test_what_a_killed_process_was_sampling_for_both_ranks_is_drawn_again(ranks):
    for found in ranks.values():
        assert found["survived"] == found["sampled"]
        assert len(found["sampled"]) == 6
    assert [found["deaths"] for found in ranks.values()] == [1, 0]
    assert "started again with the weights of version 1" in ranks[0]["warnings"][0]
    assert not ranks[1]["warnings"]


@with_vllm
def test_the_engine_sleeps_once_no_rank_samples(ranks):
    assert ranks[0]["unfinished"] == {"sleep": 0, "wake": 0}
    assert ranks[1]["kept"] > 0  # it had begun, and broke off
    for found in ranks.values():
        version, error = found["asleep"]
        assert version == -1
        assert "one that sleeps" in error
        assert found["with_kept"] == found["sampled"]


@with_vllm
def test_both_ranks_hear_of_what_is_wrong(ranks):
    for rank, found in ranks.items():
        assert "Expected prompt and completion to fit the model's 128 positions" in found["too_long"]
        assert found["context"] == 128
        assert found["wrong"].startswith("ValueError: " + "Rank 0: " * rank + "Expected all weights of the policy")
        assert found["version"] == 1


@with_vllm
@pytest.mark.timeout(600)
def test_a_rank_whose_engine_is_gone_says_so_and_nothing_is_left(model, tmp_path):
    before = set(os.listdir("/dev/shm"))
    found = visit(model, tmp_path, victim=0)
    assert found[1]["error"] == "EngineDiedError: Rank 0, which owns the vLLM engine, is gone."
    for _ in range(200):
        if not _group_lives(found[1]["pid"]):
            break
        time.sleep(0.05)
    assert not _group_lives(found[1]["pid"])
    assert set(os.listdir("/dev/shm")) <= before


def _group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@with_vllm
@pytest.mark.timeout(600)
def test_the_rank_that_owns_the_engine_goes_on_without_the_other(model, tmp_path):
    found = visit(model, tmp_path, victim=1)
    assert found[0]["error"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": "cuda", "tensor_parallel": 2, "ranks": 4},
            "Expected `tensor_parallel` 4 for an engine on the GPUs",
        ),
        ({"device": "cuda", "tensor_parallel": 2, "devices": [3]}, "Expected `devices` with 2 GPUs"),
        ({"device": "cpu", "ranks": 0}, "Expected `ranks` of at least 1, got 0"),
        ({"device": "cpu", "ranks": 2, "lora_rank": 8}, "Expected `lora_rank` null"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        SharedVLLMEngine(**options)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([("a", 0)], "Expected a number of ranks that 2 divides .*, got 1"),
        ([("a", 0), ("b", 0), ("b", 1), ("b", 2)], r"Expected ranks 0 to 1, .* on one machine, got \['a', 'b'\]"),
        ([("a", 0), ("a", 1), ("b", 0), ("b", 0)], r"Expected ranks 2 to 3, .* on GPUs of their own, .* \[0, 0\]"),
    ],
)
def test_ranks_that_cannot_share(places, message, monkeypatch):
    from prime_lightning.engines.vllm import shared as vllm_shared

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(vllm_shared, "of_all_ranks", lambda thing=None: places)
    with pytest.raises(ValueError, match=message):
        SharedVLLMEngine(device="cuda", tensor_parallel=2).start("nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_engines_for_gpus_without_a_gpu():
    words = "Expected a GPU for an engine with `device: cuda`, got none .* Set it to auto or cpu"
    with pytest.raises(ValueError, match=words):
        SharedVLLMEngine(device="cuda").start("nowhere")
    with pytest.raises(ValueError, match=words):
        VLLMEngine(device="cuda")._devices()


@pytest.mark.parametrize(("rank", "owner", "devices"), [(0, 0, [0, 1]), (1, 0, [0, 1]), (2, 2, [2, 3]), (3, 2, [2, 3])])
def test_an_engine_lies_on_the_gpus_of_its_ranks(rank, owner, devices, monkeypatch):
    from prime_lightning.engines.vllm import shared as vllm_shared

    monkeypatch.setattr(torch.cuda, "current_device", lambda: rank)
    monkeypatch.setattr(vllm_shared, "of_all_ranks", lambda thing=None: [("a", number) for number in range(4)])
    monkeypatch.setattr(vllm_shared, "rank", lambda: rank)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    engine = SharedVLLMEngine(device="cuda", tensor_parallel=2)
    engine._meet()
    assert (engine.owner, engine.owns) == (owner, rank == owner)
    assert engine.transfer == "ipc"
    assert engine._can_sleep
    assert engine._devices() == (devices if engine.owns else [])
    if engine.owns:
        assert environment_of(engine, engine._devices()) == {
            "CUDA_VISIBLE_DEVICES": ",".join(str(4 + device) for device in devices)
        }


def refuse(*_):
    raise EngineDiedError("dead")


def test_an_interrupted_call_to_the_owner_leaves_no_answer_behind():
    """The calls go to a process that is made up, from a thread of the same process."""
    answers = {"next": lambda stream: time.sleep(0.5) or ("late", None), "add": refuse}
    process = SimpleNamespace(process=SimpleNamespace(pid=7), context=128, window=4, **answers)
    owner = SimpleNamespace(process=process, ready=lambda: process, revive=lambda died, death: process)
    client = OwnerClient(share(owner), 0)
    proxy = client.present()
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            proxy.next("s0")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (client.present().pid, proxy.context, proxy.window) == (7, 128, 4)
    with pytest.raises(EngineDiedError, match=r"^dead$"):
        proxy.add([], {})
    assert proxy.next("s0") == ("late", None)
    owner.process = None
    with pytest.raises(EngineDiedError, match="The vLLM process 7 is gone"):
        proxy.next("s0")
