"""Starting and ending the vLLM engine's process: what it leaves behind, what it says when it cannot start."""

import mmap
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prime_lightning.engines import Engine
from prime_lightning.engines.vllm import group as vllm_group
from prime_lightning.engines.vllm.devices import check_devices
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.engines.vllm.errors import explain
from prime_lightning.engines.vllm.process import clean_environment
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, build_tokenizer, write_model
from prime_lightning.rollout import Sampling

real = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")

TRAINER = """
import signal, sys
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, build_tokenizer
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.rollout import Sampling

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with SIGINT ignored
engine = VLLMEngine(device="cpu", max_sequences=8)
engine.start(sys.argv[1])
prompts = [ArithmeticPrompts().prompt(draw, build_tokenizer()) for draw in range(20_000)]
for _ in engine.stream(prompts, Sampling(samples=1, max_tokens=60)):
    print(engine.process.process.pid, engine.process.folder, flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model"), hidden_size=128))


def group_is_gone(pid: int, within: float) -> bool:
    """Whether no process of the group that `pid` leads is left."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@real
def test_nothing_is_left_after_kill_9_and_ctrl_c_of_the_trainer(model, tmp_path):
    shared = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    trainers = {
        how: subprocess.Popen(
            [sys.executable, "-c", TRAINER, model],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for how in (signal.SIGKILL, signal.SIGINT)
    }
    try:
        for how, trainer in trainers.items():
            assert trainer.stdout is not None
            pid, folder = trainer.stdout.readline().split()
            assert Path(folder).is_dir()
            trainer.send_signal(how)
            trainer.wait(20)
            assert group_is_gone(int(pid), within=10)
            assert not Path(folder).exists()
    finally:
        for trainer in trainers.values():
            trainer.kill()
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir("/dev/shm")) <= shared


@real
def test_a_tied_output_layer_gets_new_weights_too(tmp_path):
    config = AutoConfig.from_pretrained(write_model(tmp_path / "untied", hidden_size=64))
    config.update({"tie_word_embeddings": True, "num_attention_heads": 2, "num_key_value_heads": 2})
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    lm.save_pretrained(tmp_path / "tied")
    build_tokenizer().save_pretrained(tmp_path / "tied")
    engine = VLLMEngine(device="cpu")
    engine.start(str(tmp_path / "tied"))
    try:
        prompts = [ArithmeticPrompts().prompt(draw, build_tokenizer()) for draw in range(8)]
        assert "lm_head.weight" in engine.copy.columns()
        for version in range(2):
            with torch.no_grad():
                lm.model.embed_tokens.weight.add_(0.1 * torch.randn_like(lm.model.embed_tokens.weight))
            engine.load_weights(lm.named_parameters(), version)
            for prompt, group in engine.stream(prompts, Sampling(samples=2, max_tokens=16)):
                for done in group:
                    tokens = torch.tensor([[*prompt.token_ids, *done.token_ids]])
                    with torch.no_grad():
                        logprobs = lm(tokens).logits[0, len(prompt.token_ids) - 1 : -1].log_softmax(-1)
                    expected = logprobs.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
                    torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)
    finally:
        engine.close()


@real
@pytest.mark.parametrize(
    ("options", "sign", "advice"),
    [
        ({"kv_cache_gib": 1e-5}, "cache blocks", "Raise the engine's `kv_cache_gib`"),
        ({"kv_cache_gib": 1e5}, "less than requested memory", "Lower the engine's `kv_cache_gib`"),
        ({"max_model_len": 4096}, "derived max_model_len", "Lower the engine's `max_model_len`"),
        ({"max_sequences": 16}, "head_dim=16", "attention heads of 32, 64"),
    ],
)
def test_a_start_that_fails_says_why_and_what_to_do(model, tmp_path, options, sign, advice):
    if "max_sequences" in options:
        config = AutoConfig.from_pretrained(write_model(tmp_path, hidden_size=64))
        config.update({"num_attention_heads": 4, "num_key_value_heads": 4})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        model = str(tmp_path)
    engine = VLLMEngine(device="cpu", **options)
    engine.start(model)
    with pytest.raises(ValueError, match="did not start") as raised:
        engine.load_weights([], 0)
    engine.close()
    first, second = str(raised.value).splitlines()
    assert sign in first
    assert advice in second


@real
def test_an_engine_that_is_killed_while_it_starts_tells_of_memory(model):
    engine = VLLMEngine(device="cpu", restarts=0)
    engine.start(model)
    os.kill(engine.process.process.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"killed from outside.*\n.*Lower the engine's `kv_cache_gib`") as raised:
        engine.ready()
    engine.close()
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "Lower `gpu_memory_utilization` or `max_sequences`",
        ),
        (
            "ValueError: Free memory on device cuda:0 (8.1/79.1 GiB) on startup is less than desired GPU memory "
            "utilization (0.4, 31.6 GiB).",
            "Do two engines, or engine and trainer, share this GPU?",
        ),
        (
            "ValueError: To serve at least one request with the models's max seq len (32768), (4.00 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (1.00 GiB).",
            "Raise the engine's `kv_cache_gib`",
        ),
    ],
)
def test_what_only_gpus_say_is_explained_in_two_lines(said, advice):
    first, second = explain(f"Traceback (most recent call last):\n  File x\n{said}").splitlines()
    assert said in first
    assert advice in second


def test_engines_of_two_ranks_on_one_gpu_are_refused(monkeypatch):
    """Also with `devices` that each rank's config names alike."""
    from prime_lightning.engines.vllm import devices as vllm_devices

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"GPU-{i}"))
    check_devices([0])  # one process: nobody to share with

    monkeypatch.setattr(vllm_devices, "of_all_ranks", lambda mine: [mine, ["GPU-7"], ["GPU-4"]])
    check_devices([5, 6])
    with pytest.raises(ValueError, match=r"engines of ranks \[0, 2\] on GPU GPU-4\.\nLeave the engine's `devices` out"):
        check_devices([4, 5])


def test_without_vllm_the_start_says_what_to_install(monkeypatch, model):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    engine = VLLMEngine(device="cpu")
    assert isinstance(engine, Engine)
    with pytest.raises(ValueError, match=r"pip install .*vllm.*--config conf/engine/hf\.yaml") as raised:
        engine.start(model)
    assert len(str(raised.value).splitlines()) == 2
    engine.close()


def test_a_missing_model_is_a_value_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="no such folder here"):
        VLLMEngine(device="cpu").start("/nowhere/at/all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "transfer": "ipc"}, "which is for GPUs"),
        ({"device": "cuda", "tensor_parallel": 2}, "Expected `devices` with 2 GPUs"),
        ({"device": "cuda", "devices": [1], "transfer": "ipc"}, "`nccl` or `host`"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(**options)


def test_shared_memory_of_a_group_ends_with_it_but_not_what_we_use():
    paths = [Path(f"/dev/shm/prime_lightning_{os.getpid()}_{name}") for name in ("theirs", "ours")]
    for path in paths:
        path.write_bytes(b"0" * 4096)
    code = "import mmap, sys, time; files = [open(p, 'r+b') for p in sys.argv[1:]]; "
    code += "kept = [mmap.mmap(f.fileno(), 0) for f in files]; print(1, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, *map(str, paths)]
    with paths[1].open("r+b") as file, mmap.mmap(file.fileno(), 0):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()
        assert vllm_group.shared_memory(process.pid) == sorted(map(str, paths))
        vllm_group.end(process.pid)
        assert process.wait() == -signal.SIGKILL
        assert [path.exists() for path in paths] == [False, True]
    paths[1].unlink()


class Sleeping:
    """An engine's process on a GPU, as far as sleep and wake see it."""

    def __init__(self) -> None:
        self.info, self.calls = {"max_model_len": 128}, []

    def wait_ready(self, timeout):
        pass

    def call(self, method, **arguments):
        self.calls.append((method, arguments))


@pytest.mark.parametrize(
    ("options", "slept", "version"),
    [
        ({}, [("sleep", {"level": 2}), ("wake", {"tags": ["weights"]})], -1),
        ({"sleep_level": 1}, [("sleep", {"level": 1}), ("wake", {"tags": None})], 3),
        ({"lora_rank": 8}, [("sleep", {"level": 1}), ("wake", {"tags": None})], 3),
        ({"sleep_level": 0}, [], 3),
        ({"devices": [1]}, [], 3),
        ({"device": "cpu"}, [], 3),
    ],
)
def test_an_engine_sleeps_on_the_trainers_gpu_alone(options, slept, version):
    """With sleep level 2 its weights are lost, so it wants new ones before it samples."""
    engine = VLLMEngine(**{"device": "cuda", **options})
    engine.process, engine.version = Sleeping(), 3
    for action in (engine.sleep, engine.sleep, engine.wake, engine.wake):
        action()
    assert engine.process.calls == slept
    assert engine.version == version
    if version < 0:
        with pytest.raises(ValueError, match="`wake` or sync it"):
            next(engine.stream([], Sampling()))


def test_the_engine_inherits_nothing_of_the_trainers_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "NCCL_DEBUG", "KEPT"):
        monkeypatch.setenv(name, "1")
    for name in ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_P2P_DISABLE", "NCCL_COMM_ID", "TORCH_NCCL_BLOCKING_WAIT"):
        monkeypatch.setenv(name, "1")
    found = clean_environment({"NCCL_DEBUG": "INFO"})
    assert all(found[name] == "1" for name in ("KEPT", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_P2P_DISABLE"))
    assert not {"NCCL_COMM_ID", "TORCH_NCCL_BLOCKING_WAIT"} & set(found)
    assert found["NCCL_DEBUG"] == "INFO"
    assert not {"RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & set(found)


def test_an_unknown_failure_is_told_whole():
    assert explain("line one\nline two") == "line one\nline two"
