"""`PrimeModule`: policy, implicit PRM and reference, and one PRIME iteration as one Lightning training step.

PRIME is arXiv 2502.01456. Read `training_step` beside its Algorithm 1; the maths stands in `algorithms`, sampling and
grading, and how weights come back to the engine, in `sampling`.

Shapes: B responses, T response tokens, b and t those of a micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from prime_lightning import algorithms as alg
from prime_lightning.models.batch import Batch
from prime_lightning.models.logprobs import ValueLM
from prime_lightning.models.lora import WithoutAdapters
from prime_lightning.models.options import Loading, Lora
from prime_lightning.models.pretrained import check_same_vocabulary, embedding_rows, ids_without_token, load_tokenizer
from prime_lightning.sampling.sync import PolicyWeights, weight_receiver
from prime_lightning.training.learning import PolicyLearner, PRMLearner, with_process_only
from prime_lightning.training.options import Credit, PolicyLoss, Probe, ProcessReward, Update, check_together
from prime_lightning.training.panel import Iteration, Panel
from prime_lightning.training.passes import Passes, check_greedy
from prime_lightning.training.run_metadata import import_path, run_metadata
from prime_lightning.training.scoring import load_scoring
from prime_lightning.training.stepping import Stepper, check_devices

ROLES = ("prm", "policy", "critic")


class PrimeModule(pl.LightningModule):
    """Process reinforcement through implicit rewards (PRIME, arXiv 2502.01456, Algorithm 1).

    Args:
        policy: Hugging Face id or folder of the policy to start from.
        prm: The same for the implicit PRM, with the policy's tokenizer; null trains on outcomes only.
        reference: The same for the frozen reference of PRM and KL; null takes the log-probs of the policy that sampled
            the rollouts, which saves a model (paper, appendix B.1).
        critic: The same for a critic, which `prime_lightning.algorithms.gae` needs; null for none.
        loading: How models are loaded.
        policy_lora: Train low-rank adapters on the policy instead of its weights; null trains all of them. A
            `reference` of the policy's name is then the policy without its adapters, which takes no memory.
        prm_lora: The same for the PRM.
        share_base: Keep the frozen weights below the adapters of policy and PRM, which are of one name, once.
        process_reward: The implicit process reward.
        gate: When the process reward counts.
        prm_loss: What trains the PRM, see `algorithms.prm_loss`.
        advantage: Estimator, see `algorithms.advantage`.
        credit: Discounts and weights.
        outcome_shaping: Changes outcome rewards on their way to advantages alone, as `algorithms.OverlongPenalty` does.
        policy_loss: Surrogate, clipping, KL, entropy and importance correction.
        policy_update: Minibatches and gradient clip of the policy.
        prm_update: The same for the PRM.
        critic_update: The same for the critic.
        policy_optimizer: Optimizer of the policy.
        prm_optimizer: Optimizer of the PRM.
        critic_optimizer: Optimizer of the critic.
        schedule: Learning-rate schedule of all of them, one step an iteration.
        probe: When the engine is asked greedily, and compared with the policy.
        seed: Of the minibatches.

    Raises:
        ValueError: if a model is missing, or the options contradict each other.
    """

    command = ""
    """What started the run, for the cards of its models."""

    def __init__(
        self,
        policy: str,
        prm: str | None = None,
        reference: str | None = None,
        critic: str | None = None,
        loading: Loading = Loading(),
        policy_lora: Lora | None = None,
        prm_lora: Lora | None = None,
        share_base: bool = False,
        process_reward: ProcessReward = ProcessReward(),
        gate: alg.ProcessGate | None = None,
        prm_loss: Callable[..., Any] = alg.ce,
        advantage: Callable[..., alg.Credit] = alg.rloo,
        credit: Credit = Credit(),
        outcome_shaping: Callable[..., Any] | None = None,
        policy_loss: PolicyLoss = PolicyLoss(),
        policy_update: Update = Update(),
        prm_update: Update = Update(grad_clip=10.0),
        critic_update: Update = Update(),
        policy_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-7, weight_decay=0.01),
        prm_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0),
        critic_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-6, weight_decay=0.01),
        schedule: LRSchedulerCallable | None = None,
        probe: Probe = Probe(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.names: dict[str, str | None] = {"policy": policy, "prm": prm, "reference": reference, "critic": critic}
        self.loading, self.adapters, self.seed = loading, {"policy": policy_lora, "prm": prm_lora}, seed
        self.share_base, rules = share_base, {"loss": policy_loss, "reward": process_reward, "credit": credit}
        check_together(self.names, self.adapters, share_base=share_base, **rules)  # type: ignore[arg-type]
        self.reward, self.gate = process_reward, gate or alg.ProcessGate()
        self.advantage, self.weights, self.loss = advantage, credit, policy_loss
        self.makers = {"policy": policy_optimizer, "prm": prm_optimizer, "critic": critic_optimizer}
        self.schedule, self.probe, self.shaping = schedule, probe, outcome_shaping
        updates = {"policy": policy_update, "prm": prm_update, "critic": critic_update}
        self.stepper = Stepper(self, updates, shared_prompts=loading.shares_prompts, seed=seed)
        self.panel = Panel(self.stepper, policy_loss)
        self.passes = Passes(self.stepper, self.names, policy_loss, process_reward)
        self.prm_learner = PRMLearner(self.passes, self.panel, prm_loss, self.gate)
        self.policy_learner = PolicyLearner(self.stepper, self.panel, policy_loss)
        self.measures = self.stepper.measures
        self.pass_rate = MeanMetric()
        self.trained: list[str] = []  # roles that have an optimizer, in the order of `ROLES`
        self.probed: int | None = None  # the iteration of the last look
        self.data: Any = None  # the data module, from `setup` on: where weights go, and which samples by them
        self._step_ends: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Iteration]:
        """One iteration of Algorithm 1, from its rollouts on, until the engine has the new policy."""
        self.rest()
        with self.stepper.one_step(self.trained):
            batch = with_process_only(batch, self.reward.process_only, self.gate, self.stepper)
            proximal_BT = self.passes.proximal(batch)
            reference_BT = self.passes.reference(batch, proximal_BT)
            anchor_BT = self.passes.anchor(batch, reference_BT)
            batch = self.panel.finite(batch, proximal_BT, reference_BT, anchor_BT)

            prm_BT = self.prm_learner.before_reward(batch, reference_BT)
            prm_BT = self.judge_prm(batch, prm_BT, reference_BT)
            process_BT = self.process_reward(batch, prm_BT, reference_BT, proximal_BT)
            self.prm_learner.after_reward(batch, reference_BT)

            batch = batch if self.gate.weight > 0 else batch.of_accepted()
            values_BT = self.stepper.score("critic", batch) if self.critic else None
            advantage_BT = self.credit(batch, process_BT, values_BT, proximal_BT, anchor_BT)
            self.policy_learner.update_critic(batch, values_BT, advantage_BT)
            advantage_BT = self.whitened(batch, advantage_BT)
            self.policy_learner.update(batch, advantage_BT, proximal_BT, anchor_BT)
        iteration = self.logged(Iteration(self.stepper.iteration - 1, batch, process_BT, advantage_BT))
        self.send_weights()
        return {"iteration": iteration}

    def judge_prm(self, batch: Batch, prm_BT: Tensor | None, reference_BT: Tensor | None) -> Tensor | None:
        """Measure the PRM by the groups that the filter kept, and move the gate by it.

        Returns its log-probs; None of a PRM that gives a number that is not finite, to any rank.
        """
        if prm_BT is None or reference_BT is None:
            return None
        reward_BT = alg.process_reward(prm_BT, reference_BT, batch.mask_BT, beta=self.reward.beta)
        ce, accuracy = self.panel.judge_prm(batch.of_accepted(), reward_BT, self.prm_learner.intercept)
        self.gate.update(ce, accuracy)
        for name in ("weight", "ce", "accuracy"):
            if getattr(self.gate, name) is not None:
                self.measures.add(f"gate/{name}", getattr(self.gate, name))
        return None if math.isnan(ce) else prm_BT

    def process_reward(
        self, batch: Batch, prm_BT: Tensor | None, reference_BT: Tensor | None, proximal_BT: Tensor | None
    ) -> Tensor | None:
        """Eq. 3 for each token or step, normalised; None without log-probs of a PRM."""
        if prm_BT is None or reference_BT is None:
            return None
        if self.reward.against == "policy":
            known = proximal_BT if batch.plain else None
            reference_BT = self.stepper.score("policy", batch) if known is None else known
        reward_BT = alg.process_reward(prm_BT, reference_BT, batch.mask_BT, beta=self.reward.beta)
        self.panel.measure_pairs("process/accuracy", batch.of_accepted(), reward_BT.sum(1))
        reward_BT = alg.to_granularity(reward_BT, batch.mask_BT, self.reward.granularity, self.step_ids(batch))
        rule, all_reduce = self.reward.normalise, self.stepper.all_reduce
        reward_BT, scale = alg.normalise(reward_BT, batch.mask_BT, rule, all_reduce=all_reduce)
        self.measures.add("process/scale", scale)
        return reward_BT

    def credit(
        self,
        batch: Batch,
        process_BT: Tensor | None,
        values_BT: Tensor | None,
        proximal_BT: Tensor | None,
        anchor_BT: Tensor | None,
    ) -> Tensor:
        """Advantages: Eq. 5, or what else `advantage` says of outcomes and token rewards; weighed here, only here."""
        weights, rows = self.weights, (batch.mask_BT, batch.group_B, batch.valid_B)
        weight = weights.process_weight * self.gate.weight
        credit = self.advantage(
            self.shaped(batch),
            process_BT if weight else None,
            *rows,
            values_BT=None if values_BT is None else values_BT / weights.outcome_weight,
            gamma_outcome=weights.gamma_outcome,
            gamma_process=weights.gamma_process,
            lam=weights.lam,
        )
        outcome_BT, paid_BT = alg.mixed(credit, outcome_weight=weights.outcome_weight, process_weight=weight)
        if batch.accepted is not None:
            outcome_BT = torch.where((batch.group_B < batch.accepted)[:, None], outcome_BT, 0.0)
        if weights.process_per == "step" and (step_ids := self.step_ids(batch)) is not None:
            paid_BT = alg.per_step(paid_BT, batch.mask_BT & batch.valid_B[:, None], step_ids)
        if self.prm is not None:
            self.measures.add("process/weight", weight)
            self.measures.add("process/advantage_share", *alg.advantage_share(paid_BT, outcome_BT, batch.mask_BT))
        advantage_BT = outcome_BT + paid_BT
        if self.loss.kl != "reward" or proximal_BT is None or anchor_BT is None:
            return advantage_BT
        return advantage_BT + alg.kl_credit(
            alg.kl(proximal_BT, anchor_BT, self.loss.kl_estimator),
            *rows,
            weight=self.loss.kl_weight,
            gamma=weights.gamma_process,
            baseline=self.critic is None,  # a critic has learned the penalty
        )

    def cut_process_reward(self) -> None:
        """Keep the process reward out for the rest of the run."""
        self.gate.close()

    def shaped(self, batch: Batch) -> Tensor:
        """Outcome rewards as the policy earns them."""
        if self.shaping is None:
            return batch.outcome_B
        reward_B: Tensor = self.shaping(batch.outcome_B, batch.response_length_B)
        kept_B = batch.of_accepted().valid_B
        self.measures.add("train/shaping", (reward_B - batch.outcome_B)[kept_B].sum(), kept_B.sum())
        return reward_B

    def whitened(self, batch: Batch, advantage_BT: Tensor) -> Tensor:
        """Advantages of mean 0 and variance 1 over all ranks, where that is asked for."""
        wanted = self.weights.whiten
        return alg.whiten(advantage_BT, batch.mask_BT, all_reduce=self.stepper.all_reduce) if wanted else advantage_BT

    def logged(self, iteration: Iteration) -> Iteration:
        """The iteration with all that was measured, which loggers get; the same numbers on all ranks."""
        numbers = self.panel.numbers(iteration)
        for logger in self.loggers:  # not by `self.log`, which repeats old values of names that come and go
            logger.log_metrics(numbers, step=iteration.number)
        self.log_dict(numbers, logger=False, batch_size=len(iteration.batch))
        return replace(iteration, metrics=numbers)

    def step_ids(self, batch: Batch) -> Tensor | None:
        """Number of the step that each response token belongs to, where rewards are per step."""
        if "step" not in (self.reward.granularity, self.weights.process_per):
            return None
        if self._step_ends is None:
            rows = embedding_rows(str(self.names["policy"])) or len(self.tokenizer)  # with ids that have no token
            words = self.tokenizer.batch_decode([[i] for i in range(rows)])
            self._step_ends = torch.tensor([self.reward.step_separator in word for word in words])
        ends_BT = self._step_ends.to(self.device)[batch.response_tokens()]
        return ends_BT.long().cumsum(1) - ends_BT.long()

    # ---- what samples

    def setup(self, stage: str) -> None:
        """Refuse what cannot train, and a data module that takes no weights; ask it for lessons."""
        check_devices(self.trainer)
        self.data = weight_receiver(self.trainer)
        reads = self.reward.update != "none" or self.reward.process_only != "none"
        if stage == "fit" and self.names["prm"] is not None and reads and self.reward.learn_from == "all":
            self.data.hand_on_rejected(self.reward.most_rejected)

    def send_weights(self) -> None:
        """Let the next rollouts be the present policy's; its version is the number of finished iterations."""
        weights = PolicyWeights(self.policy.model, self.stepper.devices.whole)
        with self.stepper.timed("sync"):
            self.data.sync(weights, self.trainer.global_step)
            if self.trainer.training and self.probe.due(self.trainer.global_step, self.probed):
                self.probed = self.trainer.global_step
                check_greedy(self.stepper, self.data, self.probe)

    def rest(self) -> None:
        """The rollouts are there: memory is the trainer's for now."""
        with self.stepper.timed("sync"):
            self.data.rest()

    def on_train_start(self) -> None:
        """Start, and resume, with the policy's weights."""
        self.send_weights()

    def on_validation_start(self) -> None:
        """Outside of `fit`, too; and start the clock of `time/evaluation`."""
        self._evaluating = time.perf_counter()
        self.send_weights()

    def on_validation_epoch_end(self) -> None:
        """Log it beside what the evaluation found."""
        self.log("time/evaluation", time.perf_counter() - self._evaluating, reduce_fx="max", sync_dist=True)

    on_test_start = on_predict_start = on_train_start

    # ---- what is evaluated and predicted

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Mean outcome of the validation rollouts: pass@1 at the sampling temperature."""
        self.pass_rate.update(batch.outcome_B[batch.valid_B])
        self.log("val/pass1", self.pass_rate, prog_bar=True, batch_size=len(batch))
        measured = batch.metrics.means()
        for name in ("length", "truncated", "unknown"):
            self.log(f"val/{name}", measured[f"rollout/{name}"], batch_size=len(batch.rollouts), sync_dist=True)
        self.log("val/long_prompts", measured["rollout/long_prompts"], reduce_fx="sum", batch_size=1, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Rollouts with their process rewards (unnormalised)."""
        reference_BT, prm_BT = self.passes.reference(batch, None), self.passes.prm(batch)
        if prm_BT is None or reference_BT is None:
            return {"batch": batch}
        process_BT = alg.process_reward(prm_BT, reference_BT, batch.mask_BT, beta=self.reward.beta)
        return {"batch": batch, "process_BT": process_BT}

    # ---- what a Lightning module has to have

    def configure_model(self) -> None:
        """Load the models, once; strategies that shard call this inside their own context."""
        if hasattr(self, "policy"):
            return

        def load(role: str, **options: Any) -> Any:
            name, lora = self.names[role], self.adapters.get(role)
            if name and role in ("policy", "reference"):  # the roles that are scored as the engine samples
                options["unused"] = ids_without_token(name, self.tokenizer)
            return name and load_scoring(name, self.loading, self.stepper.devices, lora=lora, seed=self.seed, **options)

        self.tokenizer = load_tokenizer(str(self.names["policy"]))
        self.policy = load("policy")
        self.prm = load("prm", beside=self.policy if self.share_base else None)
        below = self.adapters["policy"] is not None and self.names["reference"] == self.names["policy"]
        self.reference = WithoutAdapters(self.policy) if below else load("reference")
        self.critic = load("critic", kind=ValueLM)
        if self.reference is not None:
            self.reference.requires_grad_(False)
        for role, name in self.names.items():
            if name is not None:
                check_same_vocabulary(role, name, "policy", str(self.names["policy"]))

    def configure_optimizers(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """One optimizer a trained model, in the order of `ROLES`."""
        frozen = {"prm"} if self.reward.update == "none" else set()
        self.trained = [role for role in ROLES if getattr(self, role) is not None and role not in frozen]
        made = []
        for role in self.trained:
            optimizer = self.makers[role]([p for p in getattr(self, role).parameters() if p.requires_grad])
            schedule = {"scheduler": self.schedule(optimizer), "name": f"lr/{role}"} if self.schedule else None
            made.append({"optimizer": optimizer} | ({"lr_scheduler": schedule} if schedule else {}))
        return made

    def metadata(self) -> dict[str, Any]:
        """What the models' cards and the PRM's JSON file say."""
        return {
            "names": self.names,
            "beta": self.reward.beta,
            "granularity": self.reward.granularity,
            "step_separator": self.reward.step_separator,
            "normalise": self.reward.normalise,
            "prm_loss": import_path(self.prm_learner.loss),
            "lora": {role: asdict(lora) for role, lora in self.adapters.items() if lora is not None},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in what a resumed run needs besides weights and optimizers, and what a reader has to know."""
        state = {"gate": self.gate.state_dict(), **self.prm_learner.state_dict(), "metadata": run_metadata(self)}
        self.stepper.save(checkpoint, state, of_rank=self.prm_learner.replay.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up."""
        state = self.stepper.restore(checkpoint)
        self.gate.load_state_dict(state["gate"])
        self.prm_learner.load_state_dict(state, state["ranks"])
