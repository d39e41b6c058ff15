"""What two processes of a test run: `python vllm_ranks.py MODEL FOLDER`, each a rank with a vLLM engine of its own."""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import tiny

from prime_lightning.arithmetic import ArithmeticPrompts
from prime_lightning.engines.vllm import VLLMEngine
from prime_lightning.strategy import PrimeDeepSpeedStrategy


class Blow(pl.Callback):
    """The engine of rank 1 is killed while the trainer works at its first iteration."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        engine = trainer.datamodule.engine
        if trainer.global_rank == 1 and trainer.global_step == 0 and engine.deaths == 0:
            os.kill(engine.process.process.pid, signal.SIGKILL)


def main(model: str, folder: Path) -> None:
    strategy = PrimeDeepSpeedStrategy(stage=3, logging_level=40)
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or nothing here is sharded
    history = tiny.History()
    rollouts = tiny.data(model, engine=VLLMEngine(device="cpu"), train=ArithmeticPrompts(seed=3, operations=2))
    trainer = tiny.trainer(folder, 2, Blow(), history=history, devices=2, strategy=strategy)
    trainer.fit(tiny.module(model, policy_optimizer=tiny.adam(1e-2)), rollouts)
    batches = [out["batch"] for out in history.outputs]
    found = {
        "draws": [[rollout.prompt.draw for rollout in batch.rollouts] for batch in batches],
        "versions": [sorted(set(batch.version_BT[batch.mask_BT].tolist())) for batch in batches],
        "apart": [row["importance/abs_diff"] for row in history.rows],
        "deaths": rollouts.engine.deaths,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
