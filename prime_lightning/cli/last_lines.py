"""What a finished run says last: where everything is, and the commands that may come next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from prime_lightning.training.callbacks.files import HuggingFaceExport, RolloutLog

COMMANDS = {
    "policy": "prime-lightning evaluate --model {path} --benchmark math500",
    "prm": "prime-lightning score --prm.folder {path} --input ROWS.jsonl --out scored.jsonl",
}


def last_lines(trainer: pl.Trainer, command: str) -> Iterator[str]:
    """The lines of `fit`, `sft` and `prm`.

    Args:
        trainer: It has finished.
        command: Which of them it was.
    """
    root = Path(trainer.default_root_dir)
    yield f"Run: {root}"
    exports = [callback for callback in trainer.callbacks if isinstance(callback, HuggingFaceExport)]  # type: ignore[attr-defined]
    for role, path in ((role, export.folder / role) for export in exports for role in export.roles):
        if path.is_dir():
            yield f"  {role}: {path}"
            yield f"    {COMMANDS[role].format(path=shlex.quote(str(path)))}"
            if command == "sft":
                yield f"    prime-lightning fit --config ... --model.policy {shlex.quote(str(path))}"
    if any(isinstance(callback, RolloutLog) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        yield "  curves, health, and credit token by token:"
        yield f"    prime-lightning report {shlex.quote(str(root))}"
    saved = trainer.checkpoint_callback
    last = saved.last_model_path if isinstance(saved, ModelCheckpoint) else ""
    if last:
        yield "  to go on, with more `--trainer.max_steps`:"
        yield f"    prime-lightning {command} --config ... --ckpt_path {shlex.quote(str(last))}"
