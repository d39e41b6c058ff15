"""Rows of different lengths as one row without padding, and which of its tokens attend to which.

Shapes: B responses, L prompt and response tokens, X tokens of the packed row, S sequences of it, N places.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Attention within a packed row: the queries of a sequence are the last of its keys, and attention is causal."""

    queries: tuple[int, ...]
    """Tokens of each sequence that ask."""
    keys: tuple[int, ...]
    """Tokens that the last of them sees."""
    query_starts: Tensor
    """`[S + 1]`, int32: where the queries of each sequence begin in the row, and the row's end."""
    key_starts: Tensor
    """The same for the keys."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | None = None) -> Sequences:
        """Sequences that lie one behind another and see nothing else.

        Example:
            >>> Sequences.of((2, 3)).query_starts
            tensor([0, 2, 5], dtype=torch.int32)
        """
        starts = _starts(lengths, device)
        return cls(lengths, lengths, starts, starts)


@dataclass(frozen=True)
class Packed:
    """A batch as one row."""

    tokens_X: Tensor
    positions_X: Tensor
    """Number of each token in its own sequence, from 0."""
    place_BL: Tensor
    """Where each token of the batch stands in the row; means nothing in the padding."""
    sequences: Sequences


def pack(tokens_BL: Tensor, length_B: Tensor) -> Packed:
    """Rows of these lengths one behind another.

    Example:
        >>> packed = pack(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2]))
        >>> packed.tokens_X, packed.positions_X
        (tensor([5, 6, 7, 8, 9]), tensor([0, 1, 2, 0, 1]))
    """
    real_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) < length_B[:, None]
    row_X, positions_X = real_BL.nonzero(as_tuple=True)
    place_BL = real_BL.flatten().cumsum(0).view_as(tokens_BL) - 1
    sequences = Sequences.of(tuple(length_B.tolist()), tokens_BL.device)
    return Packed(tokens_BL[row_X, positions_X], positions_X, place_BL, sequences)


def _starts(lengths: tuple[int, ...], device: torch.device | None) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
