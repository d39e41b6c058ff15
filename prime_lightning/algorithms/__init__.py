"""The maths of PRIME (arXiv 2502.01456) as functions of tensors and numbers; every name here is an import path.

`masked` sums over masks and groups; `reward` what a token is worth to the PRM, and when; `prm_loss` how the PRM is
trained; `advantage` and `credit` what a token earns; `policy_loss` the losses of policy and critic; `measures` what is
measured of all of them. Nothing here knows of a configuration, a model, a trainer or a batch object. Shapes that differ
are a RuntimeError of torch.
"""

from prime_lightning.algorithms.advantage import (
    Credit,
    dr_grpo,
    gae,
    gae_returns,
    grpo,
    mixed,
    reinforce,
    rloo,
    rloo_official,
    rloo_printed,
)
from prime_lightning.algorithms.credit import kl_credit, per_step, without_signal
from prime_lightning.algorithms.masked import (
    AllReduce,
    aggregate,
    denominator,
    group_mean,
    group_pairs,
    group_sum,
    log_ratio,
    masked_mean,
    masked_sum,
    reverse_cumsum,
    same_group,
    whiten,
)
from prime_lightning.algorithms.measures import (
    advantage_share,
    auc,
    calibration_error,
    correlation,
    last_token_share,
    pairwise_accuracy,
    repetition,
)
from prime_lightning.algorithms.policy_loss import (
    Surrogate,
    cispo,
    clipped_surrogate,
    drop_nonfinite,
    gspo,
    importance_weight,
    kl,
    value_loss,
)
from prime_lightning.algorithms.prm_loss import (
    BaseRate,
    ce,
    dpo,
    dpo_detached,
    kto,
    nca,
    per_response,
)
from prime_lightning.algorithms.reward import OverlongPenalty, ProcessGate, normalise, process_reward, to_granularity

__all__ = [
    "AllReduce",
    "BaseRate",
    "Credit",
    "OverlongPenalty",
    "ProcessGate",
    "Surrogate",
    "advantage_share",
    "aggregate",
    "auc",
    "calibration_error",
    "ce",
    "cispo",
    "clipped_surrogate",
    "correlation",
    "denominator",
    "dpo",
    "dpo_detached",
    "dr_grpo",
    "drop_nonfinite",
    "gae",
    "gae_returns",
    "group_mean",
    "group_pairs",
    "group_sum",
    "grpo",
    "gspo",
    "importance_weight",
    "kl",
    "kl_credit",
    "kto",
    "last_token_share",
    "log_ratio",
    "masked_mean",
    "masked_sum",
    "mixed",
    "nca",
    "normalise",
    "pairwise_accuracy",
    "per_response",
    "per_step",
    "process_reward",
    "reinforce",
    "repetition",
    "reverse_cumsum",
    "rloo",
    "rloo_official",
    "rloo_printed",
    "same_group",
    "to_granularity",
    "value_loss",
    "whiten",
    "without_signal",
]
