"""The trainer's weights on their way to another process, through memory or a file that both can map.

`WeightCopy` checks names and shapes and keeps the last weights in the engine's number format: in anonymous shared
memory, which vanishes with the process however that ends, or in a file on a disk that several machines share. What is
sent can be sent again, so a dead engine comes back with the weights it had. Tensors are taken one by one and never
gathered on the device; the copy takes one model's bytes of host memory.

`HostSender` drives the four calls of vLLM's weight-transfer interface; `vllm/worker.py` is the receiving side.
`weights/cuda.py` sends without the way through host memory.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

ALIGNMENT = 64  # bytes; a cache line
READ_BACK = 12  # weights compared after each transfer
READ_BACK_ROWS = 1024  # values compared of each


class TransferClient(Protocol):
    """vLLM's control calls of a weight transfer (its `VLLMWeightSyncClient`), whatever carries them."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Shake hands, once a connection."""
        ...

    def start_weight_update(self) -> None:
        """Make the model ready to take weights."""
        ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one piece."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Take the weights into use, and drop what was cached with the old ones."""
        ...

    def read_back(self, columns: dict[str, int]) -> dict[str, list[float]]:
        """Values of the engine's own weights, see `VLLMWorker.prime_read_back`."""
        ...


def expected_weights(model: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of a model's weights, and the other names of tied ones, without loading it.

    Args:
        model: Hugging Face id or folder.
    """
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    first = {id(parameter): name for name, parameter in built.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    every = built.named_parameters(remove_duplicate=False)
    return shapes, {name: first[id(parameter)] for name, parameter in every if name not in shapes}


class WeightCopy:
    """The last weights, where another process can read them.

    Args:
        model: Hugging Face id or folder that says which weights there are.
        dtype: Number format of the engine, such as `bfloat16`.
        folder: Where to put a file that other machines can read; None is anonymous shared memory of this machine.
    """

    def __init__(self, model: str, dtype: str, folder: str | Path | None = None) -> None:
        self.shapes, self.aliases = expected_weights(model)
        self.dtype = getattr(torch, dtype)
        self.version: int | None = None
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        self.parameters = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        for name, shape in self.shapes.items():
            self.offsets[name] = self.nbytes
            length = torch.Size(shape).numel() * self.dtype.itemsize
            self.nbytes += -(-length // ALIGNMENT) * ALIGNMENT
        if folder is None:
            self._fd, self.path = os.memfd_create("prime_lightning_weights"), ""
            self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        else:
            self._fd, self.path = tempfile.mkstemp(prefix="weights-", dir=folder)
        os.ftruncate(self._fd, self.nbytes)
        buffer = torch.from_file(self.path, shared=True, size=self.nbytes, dtype=torch.uint8)
        self.tensors = {name: self._view(buffer, name) for name in self.shapes}

    def _view(self, buffer: Tensor, name: str) -> Tensor:
        shape, start = self.shapes[name], self.offsets[name]
        length = torch.Size(shape).numel() * self.dtype.itemsize
        return buffer[start : start + length].view(self.dtype).view(shape)

    def passing(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Iterator[tuple[str, Tensor]]:
        """The weights as they come, in the engine's format, each checked and copied on its way.

        `version` is None until all have passed.

        Raises:
            ValueError: if a name or a shape is not the model's, or one is missing.
        """
        self.version = None
        missing = dict.fromkeys(self.shapes)
        for name, tensor in weights:
            own = self.aliases.get(name, name)
            if self.shapes.get(own) != tuple(tensor.shape):
                known = f"shape {self.shapes[own]}" if own in self.shapes else "no such weight"
                raise ValueError(
                    f"Expected weights of the engine's model, got {name!r} with shape {tuple(tensor.shape)} ({known}). "
                    "Engine and policy must be built from the same model."
                )
            cast = tensor.detach().to(self.dtype)  # once, on its own device: half as much crosses to the host
            self.tensors[own].copy_(cast)
            missing.pop(own, None)
            yield own, cast
        if missing:
            raise ValueError(f"Expected all weights of the policy, got none for {list(missing)[:3]} ...")
        self.version = version

    def init_info(self) -> dict[str, Any]:
        """What the receiving side needs once, to map the memory."""
        return {
            "path": self.path,
            "nbytes": self.nbytes,
            "names": list(self.shapes),
            "dtype_name": str(self.dtype).removeprefix("torch."),
            "shapes": [list(shape) for shape in self.shapes.values()],
            "offsets": list(self.offsets.values()),
        }

    def columns(self) -> dict[str, int]:
        """Which column of which weights to compare after this transfer: others each time, the ends of the model always.

        The version is the seed that picks them, so that every weight has its turn.
        """
        names, dice = [*self.shapes], random.Random(self.version)
        picked = [*names[:3], *names[-3:], *self.aliases]
        picked += dice.sample(names, min(len(names), max(0, READ_BACK - len(picked))))
        widths = {name: self.shapes[self.aliases.get(name, name)][-1] for name in picked}
        return {name: dice.randrange(width) for name, width in widths.items()}

    def compare(self, columns: dict[str, int], values: dict[str, list[float]]) -> None:
        """Compare what the engine reads from its own weights with what was sent.

        Raises:
            RuntimeError: if one differs, or none could be read.
        """
        if not values:
            raise RuntimeError(f"Expected the engine to read back some of {list(columns)}, got none of them.")
        for name, got in values.items():
            sent = column_of(self.tensors[self.aliases.get(name, name)], columns[name]).float()
            found = torch.tensor(got)
            if found.shape != sent.shape or not torch.allclose(found, sent, rtol=1e-5, atol=1e-8, equal_nan=True):
                raise RuntimeError(
                    f"Expected the engine's weight {name!r} to be the one that was sent (version {self.version}), got "
                    f"other numbers: {got[:3]} instead of {sent[:3].tolist()}. Sampling with it would train on rubbish."
                )

    def close(self) -> None:
        """Give the memory back, and remove the file if there is one."""
        if self._fd < 0:
            return
        self.tensors = {}
        os.close(self._fd)
        self._fd = -1
        if not self.path.startswith("/proc/"):
            Path(self.path).unlink(missing_ok=True)


def column_of(weight: Tensor, column: int) -> Tensor:
    """A thinned-out column of a matrix, or a thinned-out vector.

    Example:
        >>> column_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1)
        tensor([2., 4.])
    """
    values = weight[:, column] if weight.ndim == 2 else weight.flatten()
    return values[:: thinning(len(values))]


def thinning(rows: int) -> int:
    """Every how many-th value of a column of so many rows is compared."""
    return max(1, rows // READ_BACK_ROWS)


def joined(of_workers: Iterable[dict[str, Sequence[Any]]]) -> dict[str, list[float]]:
    """What the workers of a tensor-parallel engine have of each weight, in the order of its rows.

    Args:
        of_workers: By name, the place of a worker's first value and its values; several may have the same.

    Example:
        >>> joined([{"a": (0, [1.0, 2.0]), "b": (0, [5.0])}, {"a": (2, [3.0]), "b": (0, [5.0])}])
        {'a': [1.0, 2.0, 3.0], 'b': [5.0]}
    """
    parts: dict[str, dict[int, list[float]]] = {}
    for worker in of_workers:
        for name, (place, values) in worker.items():
            parts.setdefault(name, {})[place] = values
    return {name: [x for place in sorted(found) for x in found[place]] for name, found in parts.items()}


class HostSender:
    """Sends through the memory of the copy, which the engine's workers map.

    Args:
        client: The engine's control calls; shakes hands at once.
        copy: What is sent.
    """

    def __init__(self, client: TransferClient, copy: WeightCopy) -> None:
        self.client, self.copy = client, copy
        client.init_weight_transfer_engine(copy.init_info())

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send what passes into the copy. Nothing reaches the engine before all of it is checked.

        Raises:
            RuntimeError: if the engine's weights are then not those that were sent.
        """
        for _ in weights:
            pass
        self.resend()

    def resend(self) -> None:
        """Send the copy as it is; raises as `send` does."""
        self.client.start_weight_update()
        self.client.update_weights({})
        self.client.finish_weight_update(str(self.copy.version))
        verify(self.client, self.copy)


def verify(client: TransferClient, copy: WeightCopy) -> None:
    """Compare a sample of the engine's weights with the copy.

    Raises:
        RuntimeError: if one differs.
    """
    columns = copy.columns()
    copy.compare(columns, client.read_back(columns))
