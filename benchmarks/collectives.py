"""What ranks ask of each other in one PRIME iteration, how many forward passes it has, and ZeRO-3's time over DDP's.

    python benchmarks/collectives.py --out collectives.json
    python benchmarks/collectives.py --size 1 --iterations 1 --turns 1      a minute, to see that it works

Two gloo processes on a CPU train policy and PRM of so many million parameters on given responses, much longer ones on
one rank than on the other, under DDP and ZeRO-3 in turns. Counted on each rank, of the last iteration: calls of each
head, gathers of its weight by ZeRO-3, all collectives, and work in units of one forward pass of one model over all
tokens (a training pass is 3, and 1 more where activations are computed again). Nothing is sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from bare import bare_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from prime_lightning.models.batch import Batch
from prime_lightning.models.head import OpenHead
from prime_lightning.models.logprobs import ScoringLM
from prime_lightning.models.options import Loading
from prime_lightning.models.pretrained import load_causal_lm
from prime_lightning.prompts.arithmetic import write_model
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.options import ProcessReward, Update

SHAPES = {1: (96, 2, 4_000), 50: (512, 5, 32_000)}  # million parameters: hidden size, layers, vocabulary
STRATEGIES = ("ddp", "zero3")
PROMPT = 8


def main(args: Sequence[str] | None = None) -> None:
    options = parser().parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        hidden, layers, vocabulary = SHAPES[options.size]
        model = load_causal_lm(str(write_model(Path(folder) / "model", hidden_size=hidden, layers=layers)))
        model.resize_token_embeddings(vocabulary)
        model.save_pretrained(Path(folder) / "model")
        launch(Path(folder), options)
        ranks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(2)]
    found = summary(ranks) | {"torch": torch.__version__, "options": vars(options), "load": os.getloadavg()}
    print(table(found))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", type=int, default=50, choices=[*SHAPES], help="million parameters")
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--iterations", type=int, default=3, help="measured in each turn, after one that is not")
    made.add_argument("--prompts", type=int, default=8, help="on both ranks together; two responses each")
    made.add_argument("--long", type=int, default=100, help="response tokens on rank 0")
    made.add_argument("--short", type=int, default=40, help="response tokens on rank 1")
    made.add_argument("--chunk_tokens", type=int, default=64)
    made.add_argument("--out")
    return made


def launch(folder: Path, options: argparse.Namespace) -> None:
    """Run `measure` in two processes that know of each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    words = [sys.executable, __file__, "rank", str(folder), json.dumps(vars(options))]
    processes = [
        subprocess.Popen(
            words,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "benchmark"},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError(f"Expected both ranks to end well, got the codes {codes}.")


# ---- on each rank


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Train in turns under each strategy; write seconds and counts."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: {"seconds": []} for name in STRATEGIES}
    for _ in range(options.turns):
        for name in STRATEGIES:
            watch = Watch(options)
            fit(folder, name, watch, options)
            found[name]["seconds"] += watch.seconds
            found[name]["counts"] = dict(watch.counts)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


def fit(folder: Path, name: str, watch: Watch, options: argparse.Namespace) -> None:
    """All iterations of one turn."""
    update = Update(minibatches=2, micro_tokens=4 * (PROMPT + options.long))
    model = str(folder / "model")
    prime = PrimeModule(
        model,
        prm=model,
        reference=model,
        loading=Loading(chunk_tokens=options.chunk_tokens, gradient_checkpointing=True),
        process_reward=ProcessReward(second_look=0),
        policy_update=update,
        prm_update=update,
    )
    prime.passes.engine_checked = True  # nothing sampled these responses
    steps = 1 + options.iterations
    trainer = bare_trainer(watch, steps=steps, devices=2, strategy=strategy(name), default_root_dir=folder)
    trainer.fit(prime, Given(options))


def strategy(name: str) -> Any:
    if name == "ddp":
        from prime_lightning.training.strategies.ddp_fsdp import PrimeDDPStrategy

        return PrimeDDPStrategy()
    from prime_lightning.training.strategies.deepspeed import PrimeDeepSpeedStrategy

    return PrimeDeepSpeedStrategy(stage=3, logging_level=40)


class Given(pl.LightningDataModule):
    """The same responses in each iteration: long ones on rank 0, short ones on rank 1, every second one right."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options

    def sync(self, weights: Any, version: int) -> None:
        """Nothing is sampled."""

    def rest(self) -> None:
        """Nothing runs."""

    def train_dataloader(self) -> DataLoader[Any]:
        batches = [self.batch()] * (1 + self.options.iterations)
        return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)

    def batch(self) -> Batch:
        assert self.trainer is not None
        rank, options = self.trainer.global_rank, self.options
        B, T = options.prompts, options.short if rank else options.long
        generator = torch.Generator().manual_seed(rank)
        return Batch(
            tokens_BL=torch.randint(4, 16, (B, PROMPT + T), generator=generator),
            prompt_length_B=torch.full((B,), PROMPT),
            response_length_B=torch.full((B,), T),
            mask_BT=torch.ones(B, T, dtype=torch.bool),
            outcome_B=torch.arange(B).remainder(2).float(),
            valid_B=torch.ones(B, dtype=torch.bool),
            group_B=torch.arange(B) // 2 * 2 + rank,
            behaviour_logprobs_BT=torch.full((B, T), -3.0),
            version_BT=torch.zeros(B, T, dtype=torch.long),
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch


class Watch(pl.Callback):
    """Times each iteration but the first, and counts the last, on this rank."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.last, self.seconds, self.counts = options.iterations, list[float](), Counter[str]()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        for role in ("policy", "prm", "reference"):
            self.watch(role, getattr(module, role))

    def watch(self, role: str, model: Any) -> None:
        for part in model.modules():
            if isinstance(part, ScoringLM):
                part.register_forward_hook(lambda _, given, out, role=role: self.passed(role, given[0]))
            if isinstance(part, OpenHead):
                part.register_forward_hook(lambda *_, role=role: self.counts.update([f"{role} head calls"]))
                weight = part.weight
        for parameter in model.parameters():
            if hasattr(parameter, "ds_id"):  # ZeRO-3's
                parameter.all_gather_coalesced = self.counting(role, weight, parameter.all_gather_coalesced)

    def passed(self, role: str, tokens_BL: Tensor) -> None:
        """A forward pass; with gradient, it is followed by twice its work, and by itself once more (checkpointing)."""
        self.counts[f"{role} forwards"] += 1
        self.counts["tokens x passes"] += tokens_BL.numel() * (4 if torch.is_grad_enabled() else 1)

    def counting(self, role: str, weight: Tensor, gather: Any) -> Any:
        def gathering(parameters: Any = None, *args: Any, **options: Any) -> Any:
            self.counts[f"{role} head gathers"] += sum(p is weight for p in parameters or ())
            return gather(parameters, *args, **options)

        return gathering

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        self.counts.clear()
        self.counts["tokens"] = batch.tokens_BL.numel()
        self.collectives = Collectives(self.counts)
        if batch_idx == self.last:
            self.collectives.__enter__()
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx > 0:
            self.seconds.append(time.perf_counter() - self.begun)
        if batch_idx == self.last:
            self.collectives.__exit__(None, None, None)


class Collectives(TorchDispatchMode):
    """Counts the collectives that this process calls."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts["collectives"] += 1
        return func(*args, **(kwargs or {}))


# ---- what it comes to


def summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of each rank, and the median over iterations of the slower rank's seconds."""
    found: dict[str, Any] = {}
    for name in STRATEGIES:
        counts = [rank[name]["counts"] for rank in ranks]
        slower = [max(pair) for pair in zip(*(rank[name]["seconds"] for rank in ranks), strict=True)]
        units = [one["tokens x passes"] / one["tokens"] for one in counts]
        found[name] = {"seconds": statistics.median(slower), "forward_units": units, "counts": counts}
    return found | {"zero3_over_ddp": found["zero3"]["seconds"] / found["ddp"]["seconds"]}


def table(found: dict[str, Any]) -> str:
    lines = ["of one iteration, rank 0 | rank 1"]
    for name in STRATEGIES:
        counts = found[name]["counts"]
        lines += [
            f"{name:6} {what:22} {' | '.join(str(one[what]) for one in counts)}"
            for what in sorted(counts[0])
            if what not in ("tokens", "tokens x passes")
        ]
        lines.append(f"{name:6} {'forward units':22} " + " | ".join(f"{u:.2f}" for u in found[name]["forward_units"]))
        lines.append(f"{name:6} {'seconds':22} {found[name]['seconds']:.3f}")
    lines.append(f"ZeRO-3 over DDP: {found['zero3_over_ddp']:.2f}")
    lines.append("load averages of the machine: " + ", ".join(f"{load:.1f}" for load in found["load"]))
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        measure(Path(sys.argv[2]), argparse.Namespace(**json.loads(sys.argv[3])))
    else:
        main()
