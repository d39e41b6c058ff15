"""What a vLLM engine is asked for on GPUs, and starts that fail, without vLLM and without a GPU."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from prime_lightning.engines.number_format import warn_of_float32
from prime_lightning.engines.samples import EngineDiedError
from prime_lightning.engines.vllm.arguments import arguments_of
from prime_lightning.engines.vllm.devices import transfer_of
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.engines.vllm.shared import SharedVLLMEngine


def asked(engine):
    engine.model = "a-model"
    return arguments_of(engine, None, can_sleep=True)


class Starts:
    """A process that says this of its start; nothing is ready."""

    def __init__(self, says):
        self.says, self.closed, self.info = says, False, {"cache_bytes": 7 * 2**30}

    def wait_ready(self, timeout):
        if self.says:
            raise EngineDiedError(self.says)

    def close(self, patience=0.0):
        self.closed = True

    def call(self, method, **arguments):
        self.calls = [*getattr(self, "calls", []), (method, arguments)]


def engine_that_starts(monkeypatch, *says, **options):
    engine = VLLMEngine(device="cpu", **options)
    processes = [Starts(what) for what in says]
    waiting = iter(processes)
    monkeypatch.setattr(engine, "_spawn", lambda: next(waiting))
    engine.process, engine.copy = engine._spawn(), SimpleNamespace(version=None, close=lambda: None)
    return engine, processes


@pytest.mark.parametrize("kind", [VLLMEngine, SharedVLLMEngine])
def test_a_gpu_engine_is_asked_for_bfloat16_and_long_steps(kind):
    arguments = asked(kind(device="cuda"))
    assert arguments["dtype"] == "bfloat16"
    assert arguments["max_num_batched_tokens"] == 8192
    assert asked(kind(device="cuda", max_batched_tokens=16384))["max_num_batched_tokens"] == 16384
    assert asked(kind(device="cuda", dtype="float32"))["dtype"] == "float32"


def test_a_cpu_engine_is_asked_for_float32():
    arguments = asked(VLLMEngine(device="cpu"))
    assert arguments["dtype"] == "float32"
    assert "max_num_batched_tokens" not in arguments


def test_float32_of_a_large_model_on_a_gpu_is_warned_of():
    with pytest.warns(UserWarning, match=r"float32 for 7.6 B parameters: 28 GiB"):
        warn_of_float32("float32", cuda=True, parameters=7_600_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_float32("bfloat16", cuda=True, parameters=7_600_000_000)
        warn_of_float32("float32", cuda=False, parameters=7_600_000_000)
        warn_of_float32("float32", cuda=True, parameters=500_000_000)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("transfer", ["auto", "ipc"])
def test_segments_that_grow_send_weights_through_the_host(monkeypatch, name, transfer):
    monkeypatch.setenv(name, "max_split_size_mb:512, expandable_segments:True")
    with pytest.warns(UserWarning, match="weights go by `transfer: host`"):
        assert transfer_of(transfer, cuda=True, devices=None) == "host"
    assert transfer_of("auto", cuda=True, devices=[1]) == "nccl"
    monkeypatch.setenv(name, "expandable_segments:False")
    assert transfer_of(transfer, cuda=True, devices=None) == "ipc"


def test_a_start_that_fails_is_tried_again_like_a_death(monkeypatch):
    engine, processes = engine_that_starts(monkeypatch, "Address already in use", "")
    with pytest.warns(UserWarning, match="death 1 of 3"):
        assert engine.ready() is processes[1]
    assert processes[0].closed
    assert engine.deaths == 1
    assert engine.ready() is processes[1]


def test_starts_that_all_fail_tell_each_reason(monkeypatch):
    engine, _ = engine_that_starts(monkeypatch, "Address already in use", "a broken pipe", restarts=1)
    with (
        pytest.warns(UserWarning, match="death 1 of 1"),
        pytest.raises(ValueError, match=r"already in use\n.*broken pipe"),
    ):
        engine.ready()


def test_what_another_start_would_say_again_is_said_at_once(monkeypatch):
    engine, _ = engine_that_starts(monkeypatch, "ImportError: nothing there", "")
    with pytest.raises(ValueError, match="installation is broken"):
        engine.ready()
    assert engine.deaths == 0


def test_an_engine_that_comes_back_fails_to_start_and_starts(monkeypatch):
    engine, processes = engine_that_starts(monkeypatch, "", "Address already in use", "")
    first = engine.ready()
    with pytest.warns(UserWarning, match="death"):
        assert engine.revive(first, EngineDiedError("killed")) is processes[2]
    assert engine.deaths == 2


def test_an_engine_that_comes_back_takes_the_cache_that_the_first_one_found(monkeypatch):
    engine, _ = engine_that_starts(monkeypatch, "")
    engine.cuda = True
    assert asked(engine)["kv_cache_memory_bytes"] is None
    engine.ready()
    assert asked(engine)["kv_cache_memory_bytes"] == 7 * 2**30
    engine.kv_cache_gib = 2
    assert asked(engine)["kv_cache_memory_bytes"] == 2 * 2**30


def test_keys_and_values_come_back_once_the_weights_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    engine = VLLMEngine(device="cuda")
    engine.process = process = Starts("")
    engine.copy = SimpleNamespace(passing=lambda weights, version: weights, close=lambda: None)
    sender = SimpleNamespace(send=lambda weights: process.call("send"))
    monkeypatch.setattr(engine, "_sender_of", lambda process: sender)
    engine.sleep()
    engine.wake()
    engine.load_weights(iter(()), 4)
    assert process.calls == [
        ("sleep", {"level": 2}),
        ("wake", {"tags": ["weights"]}),
        ("send", {}),
        ("wake", {"tags": ["kv_cache"]}),
    ]
    engine.load_weights(iter(()), 5)
    assert process.calls[4:] == [("send", {})]
