"""Checkpoints that are whole or absent: written beside, synced to disk, renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


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
