"""One vLLM engine over two processes (tensor parallel), on CPU: the same tokens, all weights, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prime_lightning.engines.hf import HFEngine
from prime_lightning.engines.samples import EngineDiedError
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, build_tokenizer, write_model
from prime_lightning.rollout import Prompt, Sampling

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")

GREEDY = Sampling(samples=1, max_tokens=24, temperature=0.0)
TRAINER = """
import sys, time
from prime_lightning.engines.vllm.engine import VLLMEngine

if __name__ == "__main__":
    engine = VLLMEngine(device="cpu", tensor_parallel=2)
    engine.start(sys.argv[1])
    print(engine.ready().process.pid, engine.process.folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four heads of 32 numbers, and one of keys and values, which both processes have."""
    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(write_model(folder, hidden_size=128))
    config.update({"num_key_value_heads": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def before() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture(scope="module")
def engine(model: str, before: set[str]) -> Iterator[VLLMEngine]:
    torch.set_num_threads(1)
    made = VLLMEngine(device="cpu", tensor_parallel=2, max_sequences=16, restarts=0)
    made.start(model)
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [ArithmeticPrompts(seed=5, operations=6).prompt(draw, build_tokenizer()) for draw in range(8)]


def weights(model: str, seed: int) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(seed)
    return [(name, p.detach() + 0.03 * torch.randn_like(p)) for name, p in load_causal_lm(model).named_parameters()]


def group_is_gone(pid: int) -> bool:
    for _ in range(200):
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_two_processes_sample_what_one_does_over_weight_updates(engine, model, prompts):
    hf = HFEngine()
    hf.start(model)
    for version in range(2):
        named = weights(model, seed=version)
        engine.load_weights(named, version)
        hf.load_weights(named, version)
        theirs = {prompt.draw: group[0] for prompt, group in hf.stream(prompts, GREEDY)}
        for prompt, (done,) in engine.stream(prompts, GREEDY):
            assert done.token_ids == theirs[prompt.draw].token_ids
            expected = torch.tensor(theirs[prompt.draw].logprobs)
            torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)
    assert engine.ready().info["world_size"] == 2


def test_every_weight_is_read_back_whole(engine, model):
    """Rows and columns of a matrix stand in both processes, one after another; keys and values twice."""
    engine.load_weights(weights(model, seed=7), 2)
    for column in (0, -1):
        columns = {name: column % shape[-1] for name, shape in engine.copy.shapes.items()}
        read = engine.process.call("read_back", columns=columns)
        assert set(read) == set(columns)
        engine.copy.compare(columns, read)
    engine.copy.tensors["model.layers.1.mlp.down_proj.weight"][0, -1] += 0.01
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj\.weight.*rubbish"):
        engine.copy.compare(columns, read)


def test_nothing_is_left_of_an_engine_that_is_killed(engine, model, prompts, before):
    pid, shared = engine.process.process.pid, set(os.listdir("/dev/shm")) - before
    assert shared
    stream = engine.stream(prompts, Sampling(samples=4, max_tokens=60))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDiedError, match="killed from outside"):
        list(stream)
    assert group_is_gone(pid)
    assert not shared & set(os.listdir("/dev/shm"))


def test_nothing_is_left_when_the_trainer_is_killed(model, before, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, str(script), model], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        pid, folder = trainer.stdout.readline().split()
        shared = set(os.listdir("/dev/shm")) - before
        assert shared
        trainer.kill()
        trainer.wait()
        assert group_is_gone(int(pid))
        assert not shared & set(os.listdir("/dev/shm"))
        assert not os.path.exists(folder)
    finally:
        trainer.kill()
