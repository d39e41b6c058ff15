"""Two ranks under ZeRO-3, each with a vLLM engine of its own, as torchrun starts them; one engine is killed."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from prime_lightning.arithmetic import write_model

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None or find_spec("deepspeed") is None, reason="vLLM or DeepSpeed is not installed"
)


@pytest.mark.timeout(1500)
def test_each_rank_samples_from_the_sharded_policy_with_its_own_engine(tmp_path):
    model = str(write_model(tmp_path / "model", hidden_size=128))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(2):
        with (tmp_path / f"log{rank}").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("vllm_ranks.py")), model, str(tmp_path)],
                    env=os.environ
                    | launcher
                    | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
                    | {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path / f"built{rank}")},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [rank.wait(1200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(text[-4000:] for text in said)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [one["deaths"] for one in found] == [0, 1]
    assert "It is started again with the weights of version 1" in said[1]
    assert found[0]["apart"] == found[1]["apart"]
    assert max(found[0]["apart"]) < 1e-4  # each token's log-prob is the policy's, at all iterations and on both ranks
    for one in found:
        assert one["versions"] == [[0], [1]]
    draws = [draw for one in found for batch in one["draws"] for draw in batch]
    assert sorted(set(draws)) == list(range(8))
    assert len(draws) == 8 * 4
