"""What processes of `sampling/test_balance.py` and `test_nodes.py` run: `python nodes_ranks.py FOLDER MODEL SCENE`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import tiny
import torch

from prime_lightning.training.options import ProcessReward, Replaying, Update


def torchrun(folder: Path, model: Path | str, scene: str, **environment: str) -> list[subprocess.Popen[str]]:
    """Two ranks on this machine under torchrun; a list of one launcher."""
    return [launcher(folder, ["--standalone", "--nproc-per-node=2"], model, scene, **environment)]


def launcher(folder: Path, options: list[str], model: Path | str, scene: str, **env: str) -> subprocess.Popen[str]:
    """`torchrun OPTIONS nodes_ranks.py ...`, its output in FOLDER."""
    words = [sys.executable, "-m", "torch.distributed.run", *options, __file__, str(folder), str(model), scene]
    return started(folder, words, **env)


def started(folder: Path, words: list[str], name: str = "", **env: str) -> subprocess.Popen[str]:
    """A process of a session of its own that writes to FOLDER/said*.txt."""
    said = (folder / f"said{name}{time.monotonic_ns()}.txt").open("w")
    where = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=os.environ | where | env, stdout=said, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def said(folder: Path) -> str:
    """What all of them said."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("said*.txt")))


def finish(processes: list[subprocess.Popen[str]], folder: Path, seconds: float = 120, ok: bool = True) -> None:
    """Wait for all of them; none may have to be killed."""
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all((code == 0) == ok for code in codes), said(folder)[-6000:]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pieces(
    model: str, reward: ProcessReward = ProcessReward(), **options: Any
) -> tuple[tiny.PrimeModule, tiny.RolloutDataModule]:
    update = Update(minibatches=2, micro_tokens=60)
    optimizers = {"policy_optimizer": adam, "prm_optimizer": adam}
    prime = tiny.module(model, policy_update=update, prm_update=update, process_reward=reward, **optimizers)
    return prime, tiny.data(model, prompts_per_batch=6, **options)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """An epsilon that keeps Adam from blowing rounding errors of tiny gradients up to whole steps."""
    return torch.optim.AdamW(parameters, lr=3e-4, eps=1e-4, weight_decay=0.0)


def balance(folder: Path, model: str) -> None:
    """Three iterations with and three without balancing, from the same batches, of which the PRM learns all."""
    from prime_lightning.sampling import datamodule as data_module
    from prime_lightning.sampling.ranks import balanced
    from prime_lightning.training.strategies.ddp_fsdp import PrimeDDPStrategy

    kept: dict[str, Any] = {"moved": 0, "rejected": []}
    every = ProcessReward(learn_from="all", replay=Replaying(iterations=2, draw="groups"))
    strict = tiny.AccuracyFilter(low=0.3, high=0.9)

    def groups(batch: Any) -> dict[int, Any]:
        length_B = (batch.prompt_length_B + batch.response_length_B).tolist()
        found: dict[int, Any] = {}
        for i, group in enumerate(batch.group_B.tolist()):
            row = found.setdefault(group, {"draw": set(), "lengths": [], "logprobs": []})
            row["draw"].add(batch.rollouts[i].prompt.draw)
            row["lengths"].append(length_B[i])
            row["logprobs"] += batch.behaviour_logprobs_BT[i, : batch.response_length_B[i]].tolist()
        return found

    def watched(batch: Any) -> Any:
        after = balanced(batch)
        if batch.rejected is None:  # it is what the filter rejected
            numbers = prime.stepper.gather((batch.numbers(), after.numbers()))
            kept["rejected"] += [[sorted(n for one in part for n in one) for part in zip(*numbers, strict=True)]]
            return after
        kept["before"], kept["after"] = groups(batch), groups(after)
        kept["moved"] += len(kept["before"].keys() - kept["after"].keys())
        return after

    data_module.balanced = watched  # type: ignore[assignment]
    for name, on in (("plain", False), ("balanced", True)):
        prime, rollouts = pieces(model, every, balance=on, train=Uneven(seed=1), accuracy_filter=strict, patience=99)
        tiny.fit(folder / name, prime, rollouts, 3, devices=2, strategy=PrimeDDPStrategy())
        kept[name] = {k: v.clone() for k, v in prime.state_dict().items()}
    torch.save(kept, folder / f"rank{prime.global_rank}.pt")


class Uneven(tiny.ArithmeticPrompts):
    """Chains that are long for rank 0 and short for rank 1."""

    def row(self, draw: int) -> Any:
        return tiny.ArithmeticPrompts(seed=self.seed, operations=1 + 3 * (draw % 2)).row(draw)


class Trouble(pl.Callback):
    """Does something bad to one rank inside an iteration.

    Args:
        kind: `raise` or `kill`.
        rank: Which one.
        iteration: When.
    """

    def __init__(self, kind: str, rank: int = 1, iteration: int = 1) -> None:
        self.kind, self.rank, self.iteration = kind, rank, iteration

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.iteration):
            print(f"trouble at {time.time()}", flush=True)
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("Expected no trouble, got some.")


def stalls(prompt: Any, completion: str) -> float:
    """A verifier that never comes back from the first prompt of rank 1."""
    while prompt.row["draw"] == 1:
        time.sleep(0.1)
    return float(prompt.answer in completion)


class Stalling(tiny.ArithmeticPrompts):
    """Arithmetic for a verifier that stalls."""

    kind = "nodes_ranks.stalls"

    def row(self, draw: int) -> Any:
        return {**super().row(draw), "draw": draw}


SCENES = {"balance": balance}

if __name__ == "__main__":
    torch.set_num_threads(1)
    SCENES[sys.argv[3]](Path(sys.argv[1]), sys.argv[2])
