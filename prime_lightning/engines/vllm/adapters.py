"""LoRA adapters on their way to vLLM, which computes with them beside the model's own weights (`VLLMEngine.lora_rank`).

They go through a folder, which vLLM reads as it reads any adapter, and stay in memory for an engine that is restarted.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prime_lightning.engines.weights.transfer import column_of

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
COMPARED = 12  # matrices after each transfer


@dataclass(frozen=True)
class Adapters:
    """Adapters of one version."""

    config: Mapping[str, Any]
    """As in peft's `adapter_config.json`."""
    tensors: Mapping[str, Tensor]
    """By peft's names, `base_model.model.(layer).lora_(A or B).weight`."""
    version: int

    @classmethod
    def taken(
        cls, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]], version: int, dtype: torch.dtype
    ) -> Adapters:
        """Copies of the adapters, in the engine's number format."""
        return cls(config, {name: w.detach().to("cpu", dtype, copy=True) for name, w in weights}, version)

    def write(self, folder: Path) -> None:
        """Write what vLLM reads."""
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(dict(self.config)))
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / "adapter_model.safetensors"
        )

    def columns(self) -> dict[str, int]:
        """Which column of which matrices to compare after this transfer: others each time."""
        dice = random.Random(self.version)
        picked = dice.sample([*self.tensors], min(COMPARED, len(self.tensors)))
        return {name: dice.randrange(self.tensors[name].shape[1]) for name in picked}

    def compare(self, columns: Mapping[str, int], values: Mapping[str, list[float]]) -> None:
        """Compare what the engine computes with and what was sent; vLLM scales `B` by `alpha / rank` itself.

        Raises:
            RuntimeError: if one differs, or none could be read.
        """
        if not values:
            raise RuntimeError(f"Expected the engine to read back some of {list(columns)}, got none of them.")
        rank = self.config["r"]
        scale = self.config["lora_alpha"] / (math.sqrt(rank) if self.config["use_rslora"] else rank)
        for name, got in values.items():
            sent = column_of(self.tensors[name] * (scale if ".lora_B" in name else 1.0), columns[name]).float()
            found = torch.tensor(got)[: len(sent)]  # vLLM has room for more ranks
            if found.shape != sent.shape or not torch.allclose(found, sent, rtol=1e-2, atol=1e-8, equal_nan=True):
                raise RuntimeError(
                    f"Expected the engine's adapter {name!r} to be the one that was sent (version {self.version}), got "
                    f"other numbers: {got[:3]} instead of {sent[:3].tolist()}. Sampling with it would train on rubbish."
                )


def room_for(rank: int) -> int:
    """The rank for which vLLM makes room.

    Raises:
        ValueError: if there is none as large.

    Example:
        >>> room_for(20)
        32
    """
    if not 1 <= rank <= RANKS[-1]:
        raise ValueError(f"Expected the engine's `lora_rank` between 1 and {RANKS[-1]}, got {rank}.")
    return next(size for size in RANKS if size >= rank)
