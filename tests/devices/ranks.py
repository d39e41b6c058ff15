"""What the processes of the tests in this folder run: `python ranks.py FOLDER SCENE...`, one process per rank.

A scene is a function below. All scenes of one launch share their processes, whose start costs more than a scene.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch

from prime_lightning import algorithms as alg
from prime_lightning.arithmetic import ArithmeticPrompts
from prime_lightning.options import Credit, PolicyLoss, ProcessReward, Update

STEPS = 20
SEED = 5


def adam(parameters: Any) -> torch.optim.Optimizer:
    """An epsilon that keeps Adam from blowing rounding errors of tiny gradients up to whole steps."""
    return torch.optim.AdamW(parameters, lr=3e-4, eps=1e-4, weight_decay=0.01)


def pieces(folder: Path, **options: Any) -> tuple[tiny.PrimeModule, tiny.RolloutDataModule]:
    """Everything that reduces over ranks, with micro-batches of few tokens, so that ranks have unequal numbers."""
    settings: dict[str, Any] = {
        "prm": str(folder / "prm"),
        "reference": str(folder / "policy"),
        "process_reward": ProcessReward(beta=0.5, replay=2),
        "gate": alg.ProcessGate(max_ce=None, min_accuracy=0.0, ramp=5),
        "credit": Credit(whiten=True),
        "policy_loss": PolicyLoss(kl="loss", kl_weight=0.01, entropy_weight=0.001),
        "policy_update": Update(minibatches=3, micro_tokens=60, grad_clip=0.5),
        "prm_update": Update(minibatches=2, micro_tokens=90, grad_clip=10.0),
        "policy_optimizer": adam,
        "prm_optimizer": adam,
        "schedule": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.2, total_iters=5),
    }
    prime = tiny.module(folder / "policy", **(settings | options))
    rollouts = tiny.data(
        folder / "policy", prompts_per_batch=6, train=ArithmeticPrompts(seed=SEED, operations=2)
    )  # no filter: which groups come next would depend on the rank
    return prime, rollouts


def strategy(name: str) -> Any:
    """A strategy by its name."""
    from prime_lightning.parallel import PrimeDDPStrategy, PrimeFSDPStrategy

    return {"one": lambda: "auto", "ddp": PrimeDDPStrategy, "fsdp2": PrimeFSDPStrategy}[name]()


def weights(prime: tiny.PrimeModule) -> dict[str, torch.Tensor]:
    """Whole weights of the trained models."""
    found = prime.trainer.strategy.lightning_module_state_dict()
    return {name: prime.devices.whole(p).clone() for name, p in found.items() if not name.startswith("reference.")}


def train(folder: Path, name: str) -> None:
    """Twenty iterations under a strategy: what was logged, and the weights behind them."""
    prime, rollouts = pieces(folder)
    world = int(os.environ.get("WORLD_SIZE", 1))
    history = tiny.fit(folder / name, prime, rollouts, STEPS, devices=world, strategy=strategy(name))
    draws = [[row.prompt.draw for row in out["batch"].rollouts] for out in history.outputs]
    told = prime.gather(draws)
    whole = weights(prime)
    if prime.global_rank == 0:
        torch.save({"rows": history.rows, "weights": whole, "draws": told}, folder / f"{name}.pt")


SCENES = dict.fromkeys(("one", "ddp", "fsdp2"), train)


def launch(folder: Path, *scenes: str, world: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """Start the processes of all ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *scenes],
            env=os.environ | {k: str(v) for k, v in shared.items()}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], seconds: float = 240) -> list[str]:
    """What each rank printed; all ranks have to end well."""
    try:
        printed = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(printed)[-8000:]
    return printed


if __name__ == "__main__":
    torch.set_num_threads(1)
    for scene in sys.argv[2:]:
        SCENES[scene](Path(sys.argv[1]), scene)
    print(json.dumps("done"))
