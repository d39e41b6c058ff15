"""`prime-lightning export`: a model of a run's checkpoint as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from prime_lightning.checkpoint import read_facts, role_weights
from prime_lightning.lora import merged_parameters, with_adapters
from prime_lightning.options import Lora
from prime_lightning.pretrained import base_of, load_causal_lm
from prime_lightning.prm.folder import claim, describe, write_model
from prime_lightning.usage import TypedParser


def parser() -> ArgumentParser:
    """Options of the command."""
    made = TypedParser(prog="prime-lightning export", description=__doc__)
    made.add_argument("--ckpt", type=Path, required=True, help="Checkpoint of a run: a file, or a strategy's folder.")
    made.add_argument("--role", type=Literal["policy", "prm", "reference"], required=True, help="Which of its models.")
    made.add_argument("--out", type=Path, required=True, help="New folder.")
    made.add_argument("--dtype", type=Literal["float32", "bfloat16", "float16"] | None, help="By default as trained.")
    made.add_argument(
        "--reference",
        type=str | None,
        help="For the PRM: hub id or folder of its reference, where the run had none of its own.",
    )
    return made


def main(args: list[str]) -> int:
    """Run the command."""
    options = parser().parse_args(args)
    claim(options.out)
    run = read_facts(options.ckpt)
    start = run["names"].get(options.role)
    if start is None:
        raise ValueError(
            f"Expected a run with a model in the role {options.role!r}, got one with "
            f"{sorted(role for role, name in run['names'].items() if name)}."
            + (" Its reference was the policy of each iteration." if options.role == "reference" else "")
        )
    weights = _weights(options.ckpt, options.role, start)
    if options.role in run.get("lora", {}):
        weights = _merged(start, Lora(**run["lora"][options.role]), weights)
    write_model(options.out, start, weights, dtype=options.dtype)
    describe(options.out, options.role, run, options.reference)
    print(f"Wrote the {options.role} after {run['iterations']} iterations: {options.out}")
    return 0


def _merged(start: str, lora: Lora, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """The weights with their adapters added, matrix by matrix."""
    with torch.device("meta"):
        model = with_adapters(
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_of(start))), lora, seed=0
        )
    model.load_state_dict(dict(weights), assign=True)
    return merged_parameters(model)


def _weights(path: Path, role: str, start: str) -> Iterable[tuple[str, Tensor]]:
    """The weights of a trained role from the checkpoint; the frozen reference is where it always was."""
    if role != "reference":
        return role_weights(path, role)
    model: Any = load_causal_lm(start)
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())
