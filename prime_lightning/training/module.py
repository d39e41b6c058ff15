"""`PrimeModule`: policy, implicit PRM and reference, and one PRIME iteration as one Lightning training step.

PRIME is arXiv 2502.01456. Read `training_step` beside its Algorithm 1; the maths stands in `algorithms`, sampling and
grading, and how weights come back to the engine, in `sampling`.

Shapes: B responses, T response tokens, b and t those of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

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
from prime_lightning.sampling.sync import PolicyWeights, check_takes_weights
from prime_lightning.training.options import Credit, PolicyLoss, Probe, ProcessReward, Update
from prime_lightning.training.prm_learning import LearningModule
from prime_lightning.training.probe import check_greedy
from prime_lightning.training.replay import Replay, share
from prime_lightning.training.run_metadata import import_path
from prime_lightning.training.scoring import load_scoring
from prime_lightning.training.together import check_together

ROLES = ("prm", "policy", "critic")


class PrimeModule(LearningModule):
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
        super().__init__(seed)
        self.names: dict[str, str | None] = {"policy": policy, "prm": prm, "reference": reference, "critic": critic}
        self.loading, self.adapters = loading, {"policy": policy_lora, "prm": prm_lora}
        self.share_base, rules = share_base, {"loss": policy_loss, "reward": process_reward, "credit": credit}
        check_together(self.names, self.adapters, share_base=share_base, **rules)  # type: ignore[arg-type]
        self.reward, self.gate = process_reward, gate or alg.ProcessGate()
        self.prm_loss, self.advantage, self.weights, self.loss = prm_loss, advantage, credit, policy_loss
        self.updates = {"policy": policy_update, "prm": prm_update, "critic": critic_update}
        self.makers = {"policy": policy_optimizer, "prm": prm_optimizer, "critic": critic_optimizer}
        self.schedule, self.probe, self.shaping = schedule, probe, outcome_shaping
        self.replay, self.base_rate = Replay(process_reward.replay), alg.BaseRate()
        self.pass_rate = MeanMetric()
        self.probed: int | None = None  # the iteration of the last look
        self._step_ends: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One iteration of Algorithm 1, from its rollouts on, until the engine has the new policy."""
        self.rest()
        with self.one_step():
            batch = self.with_process_only(batch)
            proximal_BT = self.proximal_logprobs(batch)
            reference_BT = self.reference_logprobs(batch, proximal_BT)
            anchor_BT = self.anchor_logprobs(batch, reference_BT)
            batch = self.finite(batch, proximal_BT, reference_BT, anchor_BT)

            before = self.update_prm(batch, reference_BT) if self.prm_goes_first else None
            process_BT = self.process_reward(batch, reference_BT, proximal_BT, before)
            if not self.prm_goes_first:
                self.update_prm(batch, reference_BT)

            batch = self.trusted(batch)
            values_BT = self.score(self.critic, batch) if self.critic else None
            advantage_BT = self.credit(batch, process_BT, values_BT, proximal_BT, anchor_BT)
            self.update_critic(batch, values_BT, advantage_BT)
            advantage_BT = self.whitened(batch, advantage_BT)
            self.update_policy(batch, advantage_BT, proximal_BT, anchor_BT)
        numbers = self.log_iteration(batch)
        self.send_weights()
        return {"batch": batch, "process_BT": process_BT, "advantage_BT": advantage_BT, "metrics": numbers}

    def process_reward(
        self, batch: Batch, reference_BT: Tensor | None, proximal_BT: Tensor | None, prm_BT: Tensor | None = None
    ) -> Tensor | None:
        """Eq. 3 for each token, normalised; None of a PRM that gives a number that is not finite, to any rank.

        The PRM's health is measured on the way, and the gate moves. Its log-probs are computed unless they are given.
        """
        if self.prm is None or reference_BT is None:
            return None
        prm_BT = self.score(self.prm, batch) if prm_BT is None else prm_BT
        reward_BT = alg.process_reward(prm_BT, reference_BT, batch.mask_BT, beta=self.reward.beta)
        if not self.judge_prm(batch, reward_BT):
            return None
        if self.reward.against == "policy":
            known = proximal_BT if batch.plain else None
            policy_BT = self.score(self.policy, batch) if known is None else known
            reward_BT = alg.process_reward(prm_BT, policy_BT, batch.mask_BT, beta=self.reward.beta)
        reward_BT = alg.to_granularity(reward_BT, batch.mask_BT, self.reward.granularity, self.step_ids(batch))
        reward_BT, scale = alg.normalise(reward_BT, batch.mask_BT, self.reward.normalise, all_reduce=self.all_reduce)
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
        outcome_BT = self.of_accepted(batch, outcome_BT)
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

    def whitened(self, batch: Batch, advantage_BT: Tensor) -> Tensor:
        """Advantages of mean 0 and variance 1 over all ranks, where that is asked for."""
        wanted = self.weights.whiten
        return alg.whiten(advantage_BT, batch.mask_BT, all_reduce=self.all_reduce) if wanted else advantage_BT

    def update_policy(
        self, batch: Batch, advantage_BT: Tensor, proximal_BT: Tensor | None, anchor_BT: Tensor | None
    ) -> None:
        """Eq. 6, the clipped surrogate or another, with the optional KL, entropy and importance terms.

        Without `proximal_BT` the policy's log-probs of this very pass stand for it: `exp(logp - logp.detach())`.
        """
        options = self.loss
        weight_BT = None if proximal_BT is None else self.measure_policy(batch, proximal_BT, anchor_BT)

        def terms(micro: Batch, rows: Tensor) -> Tensor:
            policy_bt, entropy_bt = self.logprobs(self.policy, micro, options.entropy, as_sampled=True)
            assert entropy_bt is not None
            t = micro.mask_BT.shape[1]
            proximal_bt, anchor_bt, weight_bt = (
                None if x_BT is None else x_BT[rows, :t] for x_BT in (proximal_BT, anchor_BT, weight_BT)
            )
            if proximal_bt is None:
                micro, proximal_bt = self.finite(micro, policy_bt), policy_bt.detach()
                weight_bt = self.measure_policy(micro, proximal_bt, anchor_bt)
            mask_bt = micro.mask_BT
            total, measured = options.surrogate(
                policy_bt,
                proximal_bt,
                advantage_BT[rows, :t],
                mask_bt,
                clip_low=options.clip_low,
                clip_high=options.clip_high,
                weight_BT=None if options.importance_cap is None else weight_bt,
                aggregate=options.aggregate,
                constant_length=options.constant_length,
            )
            extras = [-options.entropy_weight * entropy_bt] if options.entropy_weight else []
            if options.kl == "loss" and anchor_bt is not None:
                extras.append(options.kl_weight * alg.kl(policy_bt, anchor_bt, options.kl_estimator))
            for extra_bt in extras:
                total = total + alg.aggregate(extra_bt, mask_bt, options.aggregate, options.constant_length)
            self.measures.add("policy/loss", total, alg.denominator(mask_bt, options.aggregate))
            self.measures.add("policy/entropy", alg.masked_sum(entropy_bt.detach(), mask_bt), mask_bt.sum())
            self.measures.add_all(measured, mask_bt.sum())
            return total

        self.optimise("policy", batch, terms, lambda rows: alg.denominator(batch.mask_BT[rows], options.aggregate))

    def update_critic(self, batch: Batch, values_BT: Tensor | None, advantage_BT: Tensor) -> None:
        """The critic's clipped regression towards the returns of GAE."""
        if values_BT is None:
            return
        returns_BT = alg.gae_returns(advantage_BT, values_BT, batch.mask_BT)

        def terms(micro: Batch, rows: Tensor) -> Tensor:
            mask_bt, t = micro.mask_BT, micro.mask_BT.shape[1]
            new_bt, _ = self.logprobs(self.critic, micro)
            total, measured = alg.value_loss(
                new_bt, values_BT[rows, :t], returns_BT[rows, :t], mask_bt, clip=self.loss.value_clip
            )
            self.measures.add_all(measured, mask_bt.sum())
            return total

        self.optimise("critic", batch, terms, lambda rows: batch.mask_BT[rows].sum())

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
        """Refuse a data module that would go on sampling with the weights it began with, and ask it for lessons."""
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        check_takes_weights(datamodule)
        reads = self.reward.update != "none" or self.reward.process_only != "none"
        if stage == "fit" and self.names["prm"] is not None and reads and self.reward.learn_from == "all":
            assert datamodule is not None
            datamodule.hand_on_rejected(self.reward.most_rejected)

    def send_weights(self) -> None:
        """Let the next rollouts be the present policy's; its version is the number of finished iterations."""
        weights = PolicyWeights(self.policy.model, self.devices.whole)
        with self.timed_between("sync"):
            self.trainer.datamodule.sync(weights, self.trainer.global_step)  # type: ignore[attr-defined]
            if self.trainer.training and self.probe.due(self.trainer.global_step, self.probed):
                self.probed = self.trainer.global_step
                check_greedy(self, self.trainer.datamodule, self.probe)  # type: ignore[attr-defined]

    def rest(self) -> None:
        """The rollouts are there: memory is the trainer's for now."""
        with self.timed_between("sync"):
            self.trainer.datamodule.rest()  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        """Start, and resume, with the policy's weights."""
        self.send_weights()

    def on_validation_start(self) -> None:
        """Outside of `fit`, too."""
        super().on_validation_start()
        self.send_weights()

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

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same as in validation."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Rollouts with their process rewards (unnormalised)."""
        reference_BT = self.reference_logprobs(batch, None)
        if self.prm is None or reference_BT is None:
            return {"batch": batch}
        prm_BT = self.score(self.prm, batch)
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
            return name and load_scoring(name, self.loading, self.devices, lora=lora, seed=self.seed, **options)

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

    def facts(self) -> dict[str, Any]:
        """What the models' cards and the PRM's JSON file say."""
        return {
            "names": self.names,
            "beta": self.reward.beta,
            "granularity": self.reward.granularity,
            "step_separator": self.reward.step_separator,
            "normalise": self.reward.normalise,
            "prm_loss": import_path(self.prm_loss),
            "lora": {role: asdict(lora) for role, lora in self.adapters.items() if lora is not None},
        }

    def extra_state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and optimizers."""
        return {"gate": self.gate.state_dict(), "rate": self.base_rate.state_dict(), "seen_right": self.seen_right}

    def rank_state(self) -> list[dict[str, Any]]:
        """Past batches of this rank."""
        return self.replay.state_dict()

    def load_extra_state(self, state: dict[str, Any], of_ranks: list[Any]) -> None:
        """Take up that state."""
        self.gate.load_state_dict(state["gate"])
        self.base_rate.load_state_dict(state.get("rate", {"rate": None}))
        self.seen_right = state.get("seen_right", 0.0)
        self.replay.load_state_dict(share(of_ranks, self.global_rank, self.trainer.world_size))
