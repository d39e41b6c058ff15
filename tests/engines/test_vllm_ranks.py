"""Two ranks under ZeRO-3, as torchrun starts them: each with a vLLM engine of its own, or with one that both share."""

from importlib.util import find_spec

import pytest

from prime_lightning.prompts.arithmetic import write_model

if find_spec("vllm") is None or find_spec("deepspeed") is None:
    pytest.skip("vLLM or DeepSpeed is not installed", allow_module_level=True)

import vllm_ranks


@pytest.mark.timeout(1500)
def test_each_rank_samples_from_the_sharded_policy_with_its_own_engine(tmp_path):
    found, said = vllm_ranks.run(str(write_model(tmp_path / "model", hidden_size=128)), tmp_path)
    assert [one["deaths"] for one in found] == [0, 1]
    assert "It is started again with the weights of version 1" in said[1]


@pytest.mark.timeout(1500)
def test_both_ranks_sample_from_the_sharded_policy_with_one_engine_that_is_killed(tmp_path):
    found, said = vllm_ranks.run(str(write_model(tmp_path / "model", hidden_size=128)), tmp_path, "shared")
    assert [one["deaths"] for one in found] == [1, 0]
    assert "It is started again with the weights of version 1" in said[0]
