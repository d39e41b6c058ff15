"""Two ranks of a test: `python vllm_ranks.py MODEL FOLDER`, each with a vLLM engine of its own; with `shared` behind,
they share one, and with URLs these servers.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import launching
import lightning.pytorch as pl
import tiny

from prime_lightning.engines.server.engine import ServerEngine
from prime_lightning.engines.vllm.engine import VLLMEngine
from prime_lightning.engines.vllm.shared import SharedVLLMEngine
from prime_lightning.prompts.arithmetic import ArithmeticPrompts
from prime_lightning.training.strategies.deepspeed import PrimeDeepSpeedStrategy


class Blow(pl.Callback):
    """An engine is killed while the trainer works at its first iteration: that of rank 1, or the one of both."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        engine = trainer.datamodule.engine
        own = isinstance(engine, VLLMEngine) and trainer.global_rank == getattr(engine, "owner", 1)
        if own and trainer.global_step == 0 and engine.deaths == 0:
            os.kill(engine.process.process.pid, signal.SIGKILL)


def main(model: str, folder: Path, urls: list[str]) -> None:
    strategy = PrimeDeepSpeedStrategy(stage=3, logging_level=40)
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or nothing here is sharded
    history = tiny.History()
    engine = VLLMEngine(device="cpu")
    if urls == ["shared"]:
        engine = SharedVLLMEngine(device="cpu", tensor_parallel=2)
    elif urls:
        certificate = os.environ["PRIME_TEST_CERTIFICATE"]
        engine = ServerEngine(urls, api_key_variable="PRIME_TEST_KEY", certificate=certificate)
    rollouts = tiny.data(model, engine=engine, train=ArithmeticPrompts(seed=3, operations=2))
    trainer = tiny.trainer(folder, 2, Blow(), history=history, devices=2, strategy=strategy)
    trainer.fit(tiny.module(model, policy_optimizer=tiny.adam(1e-2)), rollouts)
    batches = [out.batch for out in history.outputs]
    found = {
        "draws": [[rollout.prompt.draw for rollout in batch.rollouts] for batch in batches],
        "versions": [sorted(set(batch.version_BT[batch.mask_BT].tolist())) for batch in batches],
        "apart": [row["importance/abs_diff"] for row in history.rows],
        "deaths": getattr(engine, "deaths", 0),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


def run(model: str, folder: Path, *urls: str) -> tuple[list[dict], list[str]]:
    """Start both ranks as torchrun does; returns what each found, which is checked, and what it said."""
    codes, said = launching.launch(__file__, folder, model, str(folder), *urls)
    assert codes == [0, 0], "\n".join(text[-4000:] for text in said)
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["apart"] == found[1]["apart"]
    assert max(found[0]["apart"]) < 1e-4  # each token's log-prob is the policy's, at all iterations and on both ranks
    for one in found:
        assert one["versions"] == [[0], [1]]
    draws = [draw for one in found for batch in one["draws"] for draw in batch]
    assert sorted(set(draws)) == list(range(8))
    assert len(draws) == 8 * 4
    return found, said


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
