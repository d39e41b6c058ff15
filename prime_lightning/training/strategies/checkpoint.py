"""Checkpoints that are whole or absent: written beside, synced to disk, renamed.

There are two kinds with the same content. A run whose devices hold whole models writes one file. A run whose models are
sharded writes a folder: whole tensors in safetensors files, each tensor by one rank, so that a checkpoint knows nothing
of how the run that wrote it was sharded, and any other can read it. Its `lightning.pt` has everything else, and names
the sub-folder with the tensors; it is replaced last, in one step.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "lightning.pt"
FILE_BYTES = 1 << 30  # of a tensor file, about; that much is buffered before it is written


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
        try:
            replace(checkpoint, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise OSError(not_written(target, error)) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of either kind."""
        if not Path(path).is_dir():
            return super().load_checkpoint(path, map_location, weights_only)
        checkpoint = read(path)
        weights = {name: tensor.read() for name, tensor in checkpoint["state_dict"].items()}
        return checkpoint | {
            "state_dict": weights,
            "optimizer_states": [
                whole | {"state": {i: {k: stored(v) for k, v in one.items()} for i, one in whole["state"].items()}}
                for whole in checkpoint["optimizer_states"]
            ],
        }

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint of either kind."""
        remove(path)


class Stored:
    """A tensor that is still on disk."""

    def __init__(self, file: Path, key: str) -> None:
        self.file, self.key = file, key

    def read(self) -> Tensor:
        """Read it, from a checkpoint on the CPU."""
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(self.key)  # type: ignore[no-any-return]


def stored(value: Any) -> Any:
    """The tensor itself where there is one on disk; everything else as it is."""
    return value.read() if isinstance(value, Stored) else value


class Folder:
    """A checkpoint folder while all ranks write it; they add the same tensors in the same order.

    A disk that is full on one rank must not leave the others waiting, so errors are kept until all tensors are through.

    Args:
        target: The folder.
        version: Name of the sub-folder with the tensors, unlike any other.
        rank: This rank.
        world: Number of ranks.
    """

    def __init__(self, target: Path, version: str, rank: int, world: int) -> None:
        self.target, self.version, self.rank, self.world = target, version, rank, world
        self.base = target.with_name(f".{target.name}.partial") if target.is_file() else target
        self.error: Exception | None = None
        self._keys: dict[int, str] = {}
        self._buffer: dict[str, Tensor] = {}
        self._files = 0

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def begin(self) -> None:
        """Make the folders; on rank 0."""
        with self._watched():
            (self.base / self.version).mkdir(parents=True)

    def add(self, identity: int, whole: Callable[[], Tensor]) -> str:
        """Take a tensor in; what has the same identity, such as tied weights, is taken once. Returns its key."""
        if identity not in self._keys:
            number = len(self._keys)
            self._keys[identity] = key = f"{number:06d}"
            tensor = whole()  # all ranks take part
            if number % self.world == self.rank:
                self._buffer[key] = tensor.to("cpu", copy=True).contiguous()
            if sum(kept.nbytes for kept in self._buffer.values()) > FILE_BYTES:
                self.flush()
        return self._keys[identity]

    def flush(self) -> None:
        """Write what is buffered."""
        with self._watched():
            if self._buffer and self.error is None:
                self._files += 1
                file = self.base / self.version / f"rank-{self.rank:05d}-{self._files:05d}.safetensors"
                save_file(self._buffer, file)
                sync(file)
        self._buffer = {}

    def commit(self, checkpoint: dict[str, Any]) -> None:
        """Make the new content count, in one step, and delete what does not count any more; on rank 0."""
        with self._watched():
            sync(self.base / self.version)
            replace(checkpoint | {"tensors": self.version}, self.base / INDEX)
            if self.base != self.target:  # there was a file, of a run that was not sharded
                exchange(self.base, self.target)
                self.base.unlink()
        if self.error is None:  # what cannot be deleted now is deleted after the next save
            for other in self.target.iterdir():
                if other.is_dir() and other.name != self.version:
                    shutil.rmtree(other, ignore_errors=True)

    def abandon(self) -> None:
        """Delete what was written; on rank 0."""
        shutil.rmtree(self.base / self.version, ignore_errors=True)


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint of either kind whose weights and optimizer states are read from disk when they are used.

    Those of a file are memory-mapped tensors, those of a folder are `Stored`.

    Raises:
        ValueError: if there is no checkpoint, or it cannot be read.
    """
    path = Path(path)
    index = path / INDEX if path.is_dir() else path
    if not index.is_file():
        raise ValueError(f"Expected a checkpoint file, or a folder with {INDEX}, got {str(path)!r}.")
    checkpoint = _load(index)
    if not path.is_dir():
        return checkpoint
    files = sorted((path / checkpoint["tensors"]).glob("*.safetensors"))
    places: dict[str, Stored] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            places |= {key: Stored(file, key) for key in tensors.keys()}  # noqa: SIM118
    weights = {name: places[key] for name, key in checkpoint["state_dict"].items()}
    states = [
        whole | {"state": {i: {k: places.get(v, v) if isinstance(v, str) else v for k, v in one.items()}
                           for i, one in whole["state"].items()}}
        for whole in checkpoint.get("optimizer_states", [])
    ]  # fmt: skip
    return checkpoint | {"state_dict": weights, "optimizer_states": states}


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected a checkpoint of a run, got {str(path)!r}, which cannot be read: {reason}"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"Expected a checkpoint of a run, got {str(path)!r} with a {type(loaded).__name__} in it.")
    return loaded


def role_weights(path: str | Path, role: str) -> Iterator[tuple[str, Tensor]]:
    """The weights of one model of a checkpoint of either kind, by their Hugging Face names, one after another.

    No more than one tensor is in memory at a time, unless the caller keeps them.

    Args:
        path: The checkpoint.
        role: `policy`, `prm` or `critic`.

    Raises:
        ValueError: if there is no checkpoint, or none of such a model in it.
    """
    weights = read(path)["state_dict"]
    names = [name for name in weights if name.startswith(f"{role}.")]
    if not names:
        roles = sorted({name.split(".")[0] for name in weights})
        raise ValueError(f"Expected a checkpoint with a {role}, got {str(path)!r} with {roles}.")
    for name in names:
        yield name.removeprefix(f"{role}.").removeprefix("model."), stored(weights[name])


def remove(path: str | Path) -> None:
    """Delete a checkpoint of either kind."""
    path = Path(path)
    if path.is_dir():
        (path / INDEX).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(content: Any, target: Path) -> None:
    """Write a file beside, sync, rename; the old one stays if that fails."""
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)  # of a save that was killed
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if target.is_dir():  # of a sharded run
            exchange(partial, target)
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.replace(target)
        sync(target.parent)
    finally:
        if not partial.is_dir():
            partial.unlink(missing_ok=True)  # it is there only if something went wrong


def exchange(new: Path, old: Path) -> None:
    """Let a file and a folder swap their names, in one step where the file system can (on Linux; not over NFS)."""
    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None and call(here, os.fsencode(new), here, os.fsencode(old), exchanging) == 0:
        return
    aside = old.with_name(f".{old.name}.old")
    remove(aside)
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_written(target: Path, error: object) -> str:
    """What to tell the user."""
    return (
        f"Could not write the checkpoint {target}: {error}. The last one is untouched; free some space and "
        "resume from it with --ckpt_path."
    )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What the run of a checkpoint says of itself; see `prime_lightning.training.run_metadata.run_metadata`.

    Raises:
        ValueError: if this is no checkpoint of this package, or one from before it said so.
    """
    metadata = read(path).get("prime", {}).get("metadata")
    if metadata is None:
        raise ValueError(
            f"Expected a checkpoint that names the models of its run, got {str(path)!r}. It was written by something "
            "else, or by an older version; resume the run for one iteration to write another."
        )
    return dict(metadata)
