"""What the processes of the tests in this folder run: `python ranks.py FOLDER SCENE...`, one process per rank.

A scene is a function below. All scenes of one launch share their processes, whose start costs more than a scene.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import launching
import lightning.pytorch as pl
import tiny
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from prime_lightning import algorithms as alg
from prime_lightning.models.options import Loading, Lora
from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.prm.train import LabelledDataModule, PRMModule
from prime_lightning.prompts.arithmetic import ArithmeticPrompts
from prime_lightning.sampling.sync import PolicyWeights
from prime_lightning.training.callbacks.outputs import HuggingFaceExport
from prime_lightning.training.options import Credit, PolicyLoss, ProcessReward, Replaying, Update
from prime_lightning.training.scoring import load_scoring
from prime_lightning.training.stepping import RoleStrategy, devices
from prime_lightning.training.strategies.ddp_fsdp import Sharded

STEPS = 20
SAVED = 14
SEED = 5


def adam(parameters: Any) -> torch.optim.Optimizer:
    """An epsilon that keeps Adam from blowing rounding errors of tiny gradients up to whole steps."""
    return torch.optim.AdamW(parameters, lr=3e-4, eps=1e-4, weight_decay=0.01)


def pieces(folder: Path, **options: Any) -> tuple[tiny.PrimeModule, tiny.RolloutDataModule]:
    """Everything that reduces over ranks, with micro-batches of few tokens, so that ranks have unequal numbers."""
    settings: dict[str, Any] = {
        "prm": str(folder / "prm"),
        "reference": str(folder / "policy"),
        "process_reward": ProcessReward(beta=0.5, replay=Replaying(iterations=2)),
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
        folder / "policy",
        prompts_per_batch=6,
        train=ArithmeticPrompts(seed=SEED, operations=2),
        validation=ArithmeticPrompts(seed=99, operations=2),
        validation_prompts=12,
        validation_sampling=tiny.Sampling(samples=1, max_tokens=8, temperature=0.0),
    )  # no filter: which groups come next would depend on the rank
    return prime, rollouts


def strategy(name: str, **options: Any) -> Any:
    """A strategy by its name."""
    from prime_lightning.training.strategies.ddp_fsdp import PrimeDDPStrategy, PrimeFSDPStrategy

    if name.startswith("zero"):
        from prime_lightning.training.strategies.deepspeed import PrimeDeepSpeedStrategy

        deepspeed = PrimeDeepSpeedStrategy(stage=int(name[4]), logging_level=40, **options)
        deepspeed.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or nothing here is sharded
        return deepspeed
    made = {"one": lambda: "auto", "ddp": PrimeDDPStrategy, "fsdp2": PrimeFSDPStrategy}
    return PrimeFSDPStrategy(replicas=int(name[4:])) if name.startswith("hsdp") else made[name]()


def weights(prime: pl.LightningModule) -> dict[str, torch.Tensor]:
    """Whole weights of the trained models, as their optimizers have them."""
    found, spread = prime.trainer.strategy.lightning_module_state_dict(), devices(prime.trainer)
    whole = getattr(spread, "master", spread.whole)
    return {name: whole(p).clone() for name, p in found.items() if not name.startswith("reference.")}


def train(folder: Path, name: str, after: Path | None = None, out: str = "") -> None:
    """Twenty iterations under a strategy, or the rest of them after a checkpoint; what was logged, and the weights."""
    prime, rollouts = pieces(folder)
    world, history = int(os.environ.get("WORLD_SIZE", 1)), tiny.History()
    saving = pl.callbacks.ModelCheckpoint(folder / name, "at{step}", every_n_train_steps=SAVED, save_top_k=-1)
    trainer = tiny.trainer(
        folder, STEPS, history=history, devices=world, strategy=strategy(name),
        callbacks=[tiny.Outputs(), *([] if after else [saving])], enable_checkpointing=not after,
    )  # fmt: skip
    trainer.fit(prime, rollouts, ckpt_path=after)
    draws = prime.stepper.gather([[row.prompt.draw for row in out.batch.rollouts] for out in history.outputs])
    whole, gap = weights(prime), engine_gap(prime, rollouts)
    found = {"rows": list(history.rows), "weights": whole, "draws": draws, "gap": gap}
    [found["validated"]] = trainer.validate(prime, rollouts, verbose=False)  # by the models that were trained
    if prime.global_rank == 0:
        torch.save(found, folder / f"{out or name}.pt")


def engine_gap(prime: tiny.PrimeModule, rollouts: tiny.RolloutDataModule) -> float:
    """Greatest difference between a weight of the policy and of the engine that samples from it."""
    own, before, gap = dict(rollouts.engine.model.named_parameters()), None, 0.0
    for name, weight in PolicyWeights(prime.policy.model, prime.stepper.devices.whole).merged():
        gap = max(gap, float((own[name] - weight).abs().max()))
        if isinstance(prime.trainer.strategy, Sharded):
            assert before is None or before() is None, "two gathered weights at a time"
            before = weakref.ref(weight)
        del weight
    return gap


def resume(folder: Path, scene: str) -> None:
    """`resume:A:B`: what strategy A saved, continued under B."""
    _, saved, name = scene.split(":")
    train(folder, name, folder / saved / f"atstep={SAVED}.ckpt", out=scene)


def endless(folder: Path, scene: str) -> None:
    """Saves sharded weights again and again until it is killed; all of a save have the number of the save."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from prime_lightning.training.strategies.ddp_fsdp import PrimeFSDPStrategy

    class Bare(PrimeFSDPStrategy):
        """The strategy's writing without a trainer."""

        global_rank, world_size = int(os.environ["RANK"]), 2
        is_global_zero = global_rank == 0

    dist.init_process_group("gloo")
    mesh, saving = init_device_mesh("cpu", (2,)), Bare()
    for step in range(1, 10**6):
        weights = {f"policy.model.w{i}": torch.full((1000,), float(step)) for i in range(40)}
        spread = {name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in weights.items()}
        saving.save_checkpoint({"step": step, "state_dict": spread}, folder / f"{scene}.ckpt")


def variant(folder: Path, scene: str) -> None:
    """`variant:lora:zero3`: two iterations with an option, and the second again after a checkpoint."""
    _, option, name = scene.split(":")
    history, again = tiny.History(), tiny.History()
    saving = pl.callbacks.ModelCheckpoint(folder / scene, "at{step}", every_n_train_steps=1, save_top_k=-1)
    prime, rollouts, trainer = varied(folder, option, name, history, saving)
    if option == "nan":
        spoil(prime)
    trainer.fit(prime, rollouts)
    facts = facts_of(prime, option)
    if option != "nan":  # what is spoilt depends on the iteration
        prime, rollouts, trainer = varied(folder, option, name, again)
        trainer.fit(prime, rollouts, ckpt_path=folder / scene / "atstep=1.ckpt")
    if option == "still":  # without a `fit` before
        prime, rollouts, trainer = varied(folder, option, name, tiny.History())
        [facts["validated"]] = trainer.validate(
            prime, rollouts, ckpt_path=folder / scene / "atstep=1.ckpt", verbose=False, weights_only=True
        )
    if prime.global_rank == 0:
        torch.save({"rows": history.rows, "again": again.rows, "facts": facts}, folder / f"{scene}.pt")


def chosen(folder: Path, option: str) -> dict[str, Any]:
    """What an option changes."""
    loading, base = Loading(gradient_checkpointing=True), str(folder / "policy")
    packed = Loading(gradient_checkpointing=True, attention="varlen", packed=True)
    policy, prm = Lora(rank=2, alpha=4.0), Lora(rank=3, alpha=6.0)
    changes: dict[str, dict[str, Any]] = {
        "packed": {"loading": packed},
        "lora": {"policy_lora": policy, "prm_lora": policy},
        "shared": {"policy_lora": policy, "prm_lora": prm, "prm": base, "share_base": True},  # below all three roles
        "still": {"process_reward": ProcessReward(beta=0.5, update="none")},
        "nan": {"policy_update": Update(minibatches=1, micro_tokens=60, grad_clip=0.5)},  # every rank has rows
    }
    return {"loading": loading} | changes.get(option, {})


def varied(
    folder: Path, option: str, name: str, history: tiny.History, *callbacks: pl.Callback
) -> tuple[tiny.PrimeModule, tiny.RolloutDataModule, pl.Trainer]:
    """A run with an option."""
    prime, rollouts = pieces(folder, **chosen(folder, option))
    rollouts.prompts_per_batch = 8 if option == "four" else rollouts.prompts_per_batch
    spread: Any = strategy(name)
    if name != "one":
        offload = {"device": "cpu"}
        if option == "offload":
            spread.config["zero_optimization"] |= {"offload_optimizer": offload, "offload_param": offload}
        if option == "roles":
            spread.frozen, spread.roles = "replicate", {"prm": {"zero_optimization": {"stage": 1}}}
    trainer = tiny.trainer(
        folder, 2, history=history, devices=int(os.environ.get("WORLD_SIZE", 1)), strategy=spread,
        precision="bf16-mixed" if option == "bf16" else "32-true", callbacks=[*callbacks],
        enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    return prime, rollouts, trainer


def prm(folder: Path, scene: str) -> None:
    """`prm:fsdp2`: four steps of a PRM offline, validated on prompts of which one rank has a batch more."""
    name, history = scene.split(":")[1], tiny.History()
    learner = PRMModule(str(folder / "prm"), reference=str(folder / "policy"), optimizer=adam, beta=0.5)
    rows = LabelledDataModule(str(folder / "prm"), str(folder / "labelled.jsonl"), prompts_per_batch=8,
                              validation_path=str(folder / "held_out.jsonl"))  # fmt: skip
    trainer = tiny.trainer(
        folder, 4, history=history, callbacks=[], devices=int(os.environ.get("WORLD_SIZE", 1)), strategy=strategy(name)
    )
    trainer.fit(learner, rows)
    batches = learner.stepper.gather(len(rows.val_dataloader()))
    [validated] = trainer.validate(learner, rows, verbose=False)
    whole = learner.stepper.gather({n: p.cpu() for n, p in weights(learner).items()})
    if learner.global_rank == 0:
        found = {"rows": history.rows, "weights": whole, "validated": validated, "batches": batches}
        torch.save(found, folder / f"{scene}.pt")


def loose(folder: Path, scene: str) -> None:
    """A module whose model nobody placed, under FSDP2."""
    learner = PRMModule(str(folder / "prm"), optimizer=adam)
    learner.configure_model = types.MethodType(unplaced, learner)  # type: ignore[method-assign]
    rows = LabelledDataModule(str(folder / "prm"), str(folder / "labelled.jsonl"), prompts_per_batch=8)
    try:
        tiny.trainer(folder, 1, callbacks=[], devices=2, strategy=strategy("fsdp2")).fit(learner, rows)
    except ValueError as error:
        (folder / f"loose{learner.global_rank}.txt").write_text(str(error))


def unplaced(learner: PRMModule) -> None:
    """`configure_model` without `place`."""
    learner.tokenizer = load_tokenizer(str(learner.names["prm"]))
    learner.prm = load_scoring(str(learner.names["prm"]), learner.loading, RoleStrategy())
    learner.reference = None


class Sum(pl.LightningModule):
    """One weight whose gradient is a sum of one large term and many small ones, which bfloat16 loses."""

    TERMS = [1.0] + [2.0**-9] * 256

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.policy.weight, 4.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain descent, whose step is the gradient."""
        return torch.optim.SGD(self.policy.parameters(), lr=1.0)

    def train_dataloader(self) -> list[int]:
        """One step on each rank."""
        return [0] * int(os.environ.get("WORLD_SIZE", 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """All terms, one after another, then the step."""
        optimizer: Any = self.optimizers()
        for term in self.TERMS:
            self.manual_backward((self.policy(torch.ones(1, 1, dtype=torch.bfloat16)) * term).float().sum())
        optimizer.step()


def sums(folder: Path, scene: str) -> None:
    """`sums:zero2:float32`: how far the weight of `Sum` moves under bfloat16."""
    _, name, dtype = scene.split(":")
    spread, module = strategy(name, gradient_dtype=dtype), Sum()
    moved = pl.callbacks.LambdaCallback(
        on_train_end=lambda *_: found.append(4.0 - float(spread.master(module.policy.module.weight)))
    )
    found: list[float] = []
    tiny.trainer(folder, 1, callbacks=[moved], devices=2, strategy=spread, precision="bf16-mixed").fit(module)
    if module.global_rank == 0:
        torch.save(found, folder / f"{scene}.pt")


def export(folder: Path, scene: str) -> None:
    """`export:none`: FSDP2 in bfloat16 whose last pass of the PRM has no gradient, then a Hugging Face folder."""
    update, written = scene.split(":")[1], folder / scene
    prime, rollouts = pieces(folder, process_reward=ProcessReward(beta=0.5, update=update))
    gathered: list[str] = []
    look = pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_: gathered.extend(not_sharded(prime)))
    tiny.trainer(
        folder, 2, devices=2, strategy=strategy("fsdp2"), precision="bf16-mixed", enable_checkpointing=False,
        callbacks=[look, HuggingFaceExport(str(written), ["prm"])],
    ).fit(prime, rollouts)  # fmt: skip
    masters = weights(prime)
    if prime.global_rank == 0:
        torch.save({"gathered": gathered, "weights": masters}, folder / f"{scene}.pt")


def not_sharded(prime: tiny.PrimeModule) -> list[str]:
    """Weights of which this rank holds more than its part."""
    roles = {"policy": prime.policy, "prm": prime.prm, "reference": prime.reference}
    named = [(f"{role}.{n}", p) for role, model in roles.items() if model for n, p in model.named_parameters()]
    return [name for name, parameter in named if not isinstance(parameter, DTensor)]


def spoil(prime: tiny.PrimeModule) -> None:
    """NaN in the policy's gradients of the first iteration, on the last rank only."""
    backward = prime.manual_backward

    def spoilt(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        last = prime.global_rank == prime.trainer.world_size - 1
        bad = last and prime.stepper.doing == "policy" and prime.trainer.global_step == 0
        backward(loss * float("nan") if bad else loss, *args, **kwargs)

    prime.manual_backward = spoilt  # type: ignore[method-assign]


def facts_of(prime: tiny.PrimeModule, option: str) -> dict[str, Any]:
    """How the models are spread, and how far the rotary frequencies are from float32 ones."""
    shapes = [p.shape for p in prime.reference.parameters()] if prime.reference is not None else []
    engines = getattr(prime.trainer.strategy, "engines", {})
    gap = 0.0
    for model in (prime.policy, prime.prm, prime.reference):
        for part in model.modules() if model is not None else ():
            if "inv_freq" in part._buffers:
                gap = max(gap, float((part.inv_freq.float() - type(part)(part.config).inv_freq).abs().max()))
    return {
        "reference_is_whole": all(0 not in shape for shape in shapes),
        "stages": {role: engine.zero_optimization_stage() for role, engine in engines.items()},
        "frequencies_off": gap,
        "placements": {p.placements for p in prime.parameters() if isinstance(p, DTensor)},
    }


ELSEWHERE = ("uneven", "spoilt")


def refused(folder: Path, scene: str) -> None:
    """`refused:hsdp3`: what a strategy says to a number of ranks that it cannot be laid over."""
    prime, rollouts = pieces(folder)
    try:
        tiny.trainer(folder, 1, callbacks=[], devices=4, strategy=strategy(scene.split(":")[1])).fit(prime, rollouts)
    except ValueError as error:
        (folder / f"{scene}:{os.environ['RANK']}.txt").write_text(str(error))


SCENES = {
    "variant": variant, "endless": endless, "prm": prm, "export": export, "sums": sums, "loose": loose,
    "resume": resume, "refused": refused,
}  # fmt: skip


def run(folder: Path, scene: str) -> None:
    """Any scene by its name."""
    kind = scene.split(":")[0]
    if kind in ELSEWHERE:
        importlib.import_module(kind).train(folder, scene)
    else:
        SCENES.get(kind, train)(folder, scene)


def launch(folder: Path, *scenes: str, world: int = 2, **environment: str) -> list[subprocess.Popen[bytes]]:
    """Start the processes of all ranks."""
    return launching.start(__file__, folder, str(folder), *scenes, world=world, **environment)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for scene in sys.argv[2:]:
        run(Path(sys.argv[1]), scene)
    if (
        dist.is_initialized()
    ):  # Lightning leaves gloo's threads behind, which now and then abort the process at its exit
        dist.destroy_process_group()
    print(json.dumps("done"))
