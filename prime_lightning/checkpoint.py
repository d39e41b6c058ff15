"""Checkpoints that are whole or absent: written beside, synced to disk, renamed; and what stands in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, but a crash or a full disk during a save leaves the old file as it was.

    Lightning's own writer goes through the system's temporary folder, and moving from there to another disk is a copy
    that can be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write to a temporary name in the same folder, sync, rename.

        Raises:
            OSError: if the file cannot be written; nothing is left of it then.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise OSError(
                f"Could not write the checkpoint {target}: {error}. The last one is untouched; free some space and "
                "resume from it with --ckpt_path."
            ) from error
        finally:
            partial.unlink(missing_ok=True)  # it is there only if something went wrong


def role_weights(path: Path, role: str) -> Iterator[tuple[str, Tensor]]:
    """The weights of one model of a run, by their Hugging Face names, as the checkpoint holds them.

    The file is mapped into memory, so a tensor is read from disk when it is used.

    Args:
        path: A checkpoint file.
        role: `policy`, `prm` or `critic`.

    Raises:
        ValueError: if this is no checkpoint, or it has no such model.
    """
    prefix = f"{role}.model."
    weights = _load(path).get("state_dict", {})
    if not any(name.startswith(prefix) for name in weights):
        roles = sorted({name.split(".")[0] for name in weights})
        raise ValueError(f"Expected a checkpoint with a {role}, got {str(path)!r} with {roles}.")
    for name, tensor in weights.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor


def read_facts(path: Path) -> dict[str, Any]:
    """What the run of a checkpoint says of itself; see `prime_lightning.measures.run_facts`.

    Raises:
        ValueError: if this is no checkpoint of this package, or one from before it said so.
    """
    facts = _load(path).get("prime", {}).get("facts")
    if facts is None:
        raise ValueError(
            f"Expected a checkpoint that names the models of its run, got {str(path)!r}. It was written by something "
            "else, or by an older version; resume the run for one iteration to write another."
        )
    return dict(facts)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"Expected a checkpoint file, got {str(path)!r}, which is none.")
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected a checkpoint of a run, got {str(path)!r}, which cannot be read: {reason}"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"Expected a checkpoint of a run, got {str(path)!r} with a {type(loaded).__name__} in it.")
    return loaded
