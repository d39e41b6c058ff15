"""LoRA adapters that vLLM computes with, instead of merged weights: real vLLM on a CPU against peft's own forward."""

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import tiny
import torch
from torch import nn

from prime_lightning.engines import AdapterEngine
from prime_lightning.engines.hf import truncate
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.models.lora import adapter_config, adapter_parameters, with_adapters
from prime_lightning.models.options import Lora
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.prompts.arithmetic import ArithmeticPrompts, build_tokenizer, write_model
from prime_lightning.rollout import Prompt, Sampling
from prime_lightning.sampling.sync import PolicyWeights

real = pytest.mark.skipif(
    find_spec("vllm") is None or find_spec("peft") is None, reason="vLLM or peft is not installed (docs/vllm.md)"
)

GREEDY = Sampling(samples=1, max_tokens=24, temperature=0.0)
NUCLEUS = Sampling(samples=2, max_tokens=24, temperature=0.7, top_p=0.9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(write_model(tmp_path_factory.mktemp("model"), hidden_size=128))


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[VLLMEngine]:
    made = VLLMEngine(device="cpu", max_sequences=32, lora_rank=4)
    made.start(model)
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [ArithmeticPrompts(seed=5, operations=36).prompt(draw, build_tokenizer()) for draw in range(8)]


def adapted(model: str, seed: int, **options) -> nn.Module:
    """A policy whose adapters were trained, as far as an engine can tell."""
    policy = with_adapters(load_causal_lm(model), Lora(rank=4, alpha=8.0, **options), 0).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return policy


def send(engine: VLLMEngine, policy: nn.Module, version: int) -> None:
    engine.load_adapters(adapter_config(policy), adapter_parameters(policy), version)


def samples_of(policy: nn.Module, engine: VLLMEngine, prompts: list[Prompt], sampling: Sampling) -> int:
    """Compare each sample with one forward pass of the policy; the number of samples."""
    count = 0
    for prompt, group in engine.stream(prompts, sampling):
        for done in group:
            with torch.no_grad():
                logits = policy(torch.tensor([[*prompt.token_ids, *done.token_ids]])).logits[0]
            logits = logits[len(prompt.token_ids) - 1 : -1]
            if sampling.temperature:
                logits = truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p)
            else:
                assert logits.argmax(-1).tolist() == done.token_ids
            expected = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)
            assert set(done.versions) == {engine.version}
            count += 1
    return count


@real
def test_samples_are_the_adapted_policys_over_updates(engine, model, prompts):
    assert isinstance(engine, AdapterEngine)
    for version in range(3):
        policy = adapted(model, seed=version, rslora=version == 2)
        send(engine, policy, version)
        assert engine.version == version
        assert samples_of(policy, engine, prompts, GREEDY) == 8
        assert samples_of(policy, engine, prompts, NUCLEUS) == 16


@real
def test_all_adapters_can_be_read_back_and_others_are_noticed(engine, model):
    send(engine, adapted(model, seed=3), 3)
    assert len(engine.adapters.columns()) == 12
    columns = {name: tensor.shape[1] - 1 for name, tensor in engine.adapters.tensors.items()}
    read = engine.process.call("read_adapters", columns=columns)
    assert set(read) == set(columns) == set(engine.adapters.tensors)
    engine.adapters.compare(columns, read)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    engine.adapters.tensors[name][0, -1] += 0.1
    with pytest.raises(RuntimeError, match=r"v_proj\.lora_B\.weight.*rubbish"):
        engine.adapters.compare(columns, read)


@real
def test_a_killed_engine_comes_back_with_the_adapters(engine, model, prompts):
    policy = adapted(model, seed=4)
    send(engine, policy, 4)
    os.kill(engine.process.process.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="started again with the weights of version 4"):
        assert samples_of(policy, engine, prompts, GREEDY) == 8


@real
def test_adapters_that_are_too_large_are_refused(engine, model):
    large = with_adapters(load_causal_lm(model), Lora(rank=16, alpha=8.0), 0)
    with pytest.raises(ValueError, match=r"adapters of rank 4 at most \(`lora_rank`\), got 16"):
        send(engine, large, 5)


@real
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_trains_on_samples_of_its_own_adapters(engine, model, tmp_path, staleness):
    """The first batch is compared with the trainer's log-probs anyway; here all are."""
    data = tiny.data(model, engine=engine, max_staleness=staleness)
    data.verifiers.submit = tiny.parity
    prime = tiny.module(model, policy_lora=Lora(rank=4, alpha=8.0), policy_optimizer=tiny.adam(3e-2))
    history = tiny.fit(tmp_path, prime, data, 3)
    assert [row["importance/abs_diff"] < 1e-4 for row in history.rows if row["rollout/policy_lag"] == 0] == (
        [True] * (1 if staleness else 3)
    )
    assert max(t.abs().max() for n, t in adapter_parameters(prime.policy.model) if "lora_B" in n) > 1e-2


def test_options_that_do_not_go_together_are_refused(model):
    with pytest.raises(ValueError, match="read its weights from disk"):
        VLLMEngine(device="cpu", lora_rank=4, args={"load_format": "dummy"})
    with pytest.raises(ValueError, match="`lora_rank` null with `tensor_parallel` 2, got 4"):
        VLLMEngine(device="cpu", lora_rank=4, tensor_parallel=2)
    with pytest.raises(ValueError, match="`lora_rank` between 1 and 512, got 0"):
        VLLMEngine(device="cpu", lora_rank=0)
    assert VLLMEngine(device="cuda", lora_rank=20).sleep_level == 1
    data = tiny.data(model, engine=VLLMEngine(device="cpu", lora_rank=8))
    with pytest.raises(ValueError, match=r"a policy with adapters.*Add --config conf/model/lora\.yaml"):
        data.sync(PolicyWeights(load_causal_lm(model)), 0)
