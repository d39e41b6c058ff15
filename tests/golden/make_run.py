"""Writes tests/golden/run.json: what five iterations of a tiny random model log. Run it from the tests folder:

    PYTHONPATH=. python golden/make_run.py

A change that is meant to leave the numbers alone must leave that file as it is.
"""

import json
import tempfile
from concurrent.futures import Future
from pathlib import Path

import tiny

from prime_lightning import algorithms as alg
from prime_lightning.prompts.arithmetic import write_model
from prime_lightning.rollout import Prompt, Verdict
from prime_lightning.training.options import Credit, PolicyLoss, ProcessReward, Replaying
from prime_lightning.verifiers import Verifiers

FILE = Path(__file__).parent / "run.json"


class Parity(Verifiers):
    """A task that even a random model gets right half of the time: an even checksum of the completion."""

    def submit(self, prompt: Prompt, text: str) -> Future[Verdict]:
        return tiny.parity(prompt, text)


def run() -> list[dict[str, float]]:
    """The logged numbers of each iteration, and the size of the weights behind the last."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(f"{folder}/model", seed=3, hidden_size=32)
        prime = tiny.module(
            model,
            reference=str(model),
            process_reward=ProcessReward(beta=0.5, replay=Replaying(iterations=2)),
            gate=alg.ProcessGate(max_ce=None, min_accuracy=0.0, ramp=2),
            credit=Credit(whiten=True, gamma_process=0.9),
            policy_loss=PolicyLoss(kl="loss", kl_weight=0.01, entropy_weight=0.001),
        )
        rollouts = tiny.data(model, verifiers=Parity(), accuracy_filter=tiny.AccuracyFilter())
        history = tiny.fit(folder, prime, rollouts, 5)
        rows = [{name: float(value) for name, value in row.items() if name != "epoch"} for row in history.rows]
        for role in ("policy", "prm"):
            size = sum(float(p.detach().double().abs().sum()) for p in getattr(prime, role).parameters())
            rows[-1][f"{role}/weights"] = size
    return rows


if __name__ == "__main__":
    FILE.write_text(json.dumps(run(), indent=1) + "\n")
