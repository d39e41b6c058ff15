"""The maths of PRIME (arXiv 2502.01456) as functions of tensors and numbers; every name here is an import path.

`masked` sums over masks and groups; `reward` what a token is worth to the PRM; `prm_loss` and `health` how the PRM is
trained and judged; `shaping` what is added to outcomes, `advantage` and `credit` what a token earns; `surrogate`,
`importance` and `loss` the losses of policy and critic. Nothing here knows of a configuration, a model, a trainer or a
batch object. Shapes that differ are a RuntimeError of torch.
"""

from prime_lightning.algorithms.advantage import (
    Credit,
    dr_grpo,
    gae,
    gae_returns,
    grpo,
    reinforce,
    rloo,
    rloo_official,
    rloo_printed,
)
from prime_lightning.algorithms.credit import kl_credit, mixed, per_step, without_signal
from prime_lightning.algorithms.health import (
    advantage_share,
    auc,
    calibration_error,
    correlation,
    last_token_share,
    pairwise_accuracy,
    repetition,
)
from prime_lightning.algorithms.importance import importance_weight
from prime_lightning.algorithms.loss import drop_nonfinite, kl, value_loss
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
from prime_lightning.algorithms.prm_loss import (
    BaseRate,
    ce,
    dpo,
    dpo_detached,
    kto,
    nca,
    per_response,
)
from prime_lightning.algorithms.reward import ProcessGate, normalise, process_reward, to_granularity
from prime_lightning.algorithms.shaping import OverlongPenalty
from prime_lightning.algorithms.surrogate import Surrogate, cispo, clipped_surrogate, gspo

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
