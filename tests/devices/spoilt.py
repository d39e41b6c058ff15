"""An engine that is wrong on one rank only: `spoilt:STRATEGY`, what each rank says of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ranks
import tiny
import torch


class Spoilt(tiny.HFEngine):
    """On the last rank it loses one weight after it was sent."""

    def load_weights(self, weights: Any, version: int) -> None:
        super().load_weights(weights, version)
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            with torch.no_grad():
                self.model.model.layers[0].mlp.down_proj.weight.neg_()


def train(folder: Path, scene: str) -> None:
    """One iteration, if it came to it."""
    prime, rollouts = ranks.pieces(folder)
    rollouts.engine, said, spread = Spoilt(batch_size=32), "", ranks.strategy(scene.split(":")[1])
    try:
        tiny.trainer(folder, 1, callbacks=[], devices=2, strategy=spread).fit(prime, rollouts)
    except (ValueError, RuntimeError) as error:
        said = str(error)
    (folder / f"{scene}:{os.environ['RANK']}.txt").write_text(said)
