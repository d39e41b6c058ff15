"""What each process of the test with two ranks runs: `python two_ranks.py FOLDER MODEL BENCHMARK`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from prime_lightning.evaluation.callback import Benchmarks
from prime_lightning.training.strategies.ddp_fsdp import PrimeDDPStrategy


def main(folder, model, benchmark):
    callback = Benchmarks(folder, [benchmark], after=False)
    trainer = tiny.trainer(folder, 1, callback, devices=2, strategy=PrimeDDPStrategy())
    trainer.fit(tiny.module(model), tiny.data(model))
    assert f"{Path(benchmark).stem}/avg4" in trainer.callback_metrics  # on every rank


if __name__ == "__main__":
    main(*sys.argv[1:])
