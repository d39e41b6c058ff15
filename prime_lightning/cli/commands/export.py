"""`prime-lightning export`: a model of a run's checkpoint as a Hugging Face folder, and on the hub if wanted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined] # of what it asks by
from jsonargparse import ArgumentParser
from rich.filesize import decimal
from torch import Tensor
from transformers import AutoModelForCausalLM

from prime_lightning.cli.usage import TypedParser
from prime_lightning.models.lora import merged_parameters, with_adapters
from prime_lightning.models.options import Lora
from prime_lightning.models.pretrained import load_causal_lm, load_config
from prime_lightning.models.prm_folder import claim, describe, write_model
from prime_lightning.training.strategies.checkpoint import read_metadata, role_weights


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
    made.add_argument("--push_to_hub", type=str | None, help="Upload the folder, too: `user/name` on the hub.")
    made.add_argument("--public", action="store_true", help="Everybody may see it; by default it is private.")
    made.add_argument("--dry_run", action="store_true", help="Say what would be uploaded, and do not.")
    return made


def main(args: list[str]) -> int:
    """Run the command."""
    options = parser().parse_args(args)
    claim(options.out)
    if (options.public or options.dry_run) and options.push_to_hub is None:
        raise ValueError("Expected --push_to_hub with --public or --dry_run, got none.")
    run = read_metadata(options.ckpt)
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
    if options.push_to_hub is not None:
        push(options.out, options.push_to_hub, public=options.public, dry_run=options.dry_run)
    return 0


def push(folder: Path, name: str, *, public: bool, dry_run: bool) -> None:
    """Upload a model's folder to the hub, as one commit; the repository is made if it is not there.

    Raises:
        ValueError: if the hub refuses it.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    size, who = sum(path.stat().st_size for path in files), "public" if public else "private"
    what = f"{', '.join(path.name for path in files)} ({decimal(size)}) to {name} ({who})"
    if dry_run:
        print(f"Would upload {what}.")
        return
    try:
        url = HfApi().create_repo(name, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=f"{folder.name} by prime-lightning")
    except (HTTPError, OSError, HFValidationError) as error:
        raise ValueError(
            f"Expected a hub that takes {name!r}, got: {str(error).rstrip('.')}. Log in with `hf auth login`; the "
            f"folder {str(folder)!r} is whole, and `hf upload` sends it again."
        ) from None
    print(f"Uploaded {what}: {url}")


def _merged(start: str, lora: Lora, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """The weights with their adapters added, matrix by matrix."""
    with torch.device("meta"):
        model = with_adapters(AutoModelForCausalLM.from_config(load_config(start)), lora, seed=0)
    model.load_state_dict(dict(weights), assign=True)
    return merged_parameters(model)


def _weights(path: Path, role: str, start: str) -> Iterable[tuple[str, Tensor]]:
    """The weights of a trained role from the checkpoint; the frozen reference is where it always was."""
    if role != "reference":
        return role_weights(path, role)
    model: Any = load_causal_lm(start)
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())
