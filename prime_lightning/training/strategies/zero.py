"""Tables of a DeepSpeed configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]


def merged(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A config with overrides, table by table.

    Example:
        >>> merged({"zero_optimization": {"stage": 3}}, {"zero_optimization": {"offload_param": {"device": "cpu"}}})
        {'zero_optimization': {'stage': 3, 'offload_param': {'device': 'cpu'}}}
    """
    result = copy.deepcopy(config)
    for name, value in overrides.items():
        result[name] = merged(result.get(name, {}), value) if isinstance(value, Mapping) else value
    return result


def stage_of(config: Config) -> int:
    """The ZeRO stage of a DeepSpeed config; 0 where it names none."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def check_partition(config: Config) -> None:
    """Refuse ZeRO++'s second partition of weights inside nodes.

    Raises:
        ValueError: if a config asks for it. DeepSpeed makes its group with the first model that it loads and fails at
            the second (`deepspeed.utils.groups`); asked for by the config of a model alone, it does nothing.
    """
    size = config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if size > 1:
        raise ValueError(
            f"Expected no `zero_hpz_partition_size`, which DeepSpeed has for one model a process only, got {size}. "
            "conf/strategy/hsdp.yaml gathers weights inside nodes."
        )


def exact_sums() -> Config:
    """Gradients of bfloat16 models are added up over micro-batches, and reduced over ranks, in float32."""
    return {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
