"""Rows of different lengths as one row without padding, and which of its tokens attend to which.

Responses to one prompt may share it: its tokens stand in the row once, before the first of them, and all of them see
it. For a prompt of P tokens and K responses of T each, that is P + K T tokens to compute instead of K (P + T).

Shapes: B responses, L prompt and response tokens, X tokens of the packed row, Y keys, S sequences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

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
    key_Y: Tensor | None = None
    """Token of the row that each key is; None where keys are the queries."""

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


def pack(tokens_BL: Tensor, length_B: Tensor, prompt_length_B: Tensor | None = None) -> Packed:
    """Rows of these lengths one behind another.

    Args:
        tokens_BL: Padded on the right.
        length_B: Tokens of each row; best on the host, which then waits for no device.
        prompt_length_B: Tokens at the beginning of each row that stand in the packed row once if other rows begin with
            the same ones; None shares nothing.

    Example:
        >>> packed = pack(torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.tensor([3, 3]), torch.tensor([2, 2]))
        >>> packed.tokens_X, packed.positions_X
        (tensor([5, 6, 7, 8]), tensor([0, 1, 2, 2]))
        >>> packed.sequences.queries, packed.sequences.keys, packed.sequences.key_Y
        ((3, 1), (3, 3), tensor([0, 1, 2, 0, 1, 3]))
    """
    B, L = tokens_BL.shape
    column_L, row_B = (torch.arange(n, device=length_B.device) for n in (L, B))
    real_BL = column_L < length_B[:, None]
    first_B = row_B if prompt_length_B is None else first_with_prompt(tokens_BL, prompt_length_B)
    own_BL = real_BL
    if prompt_length_B is not None:
        own_BL = real_BL & ((first_B == row_B)[:, None] | (column_L >= prompt_length_B[:, None]))
    row_X, positions_X = own_BL.nonzero(as_tuple=True)
    place_BL = own_BL.flatten().cumsum(0).view(B, L) - 1
    place_BL = place_BL.where(own_BL, place_BL[first_B])
    laid_out = (x.to(tokens_BL.device, non_blocking=True) for x in (row_X, positions_X, place_BL))
    there_X, positions_X, there_BL = laid_out
    queries, keys = own_BL.sum(1).tolist(), length_B.tolist()
    asking = [i for i, q in enumerate(queries) if q]
    sequences = Sequences.of(tuple(queries[i] for i in asking), tokens_BL.device)
    if prompt_length_B is not None:
        seen = tuple(keys[i] for i in asking)
        key_Y = place_BL[real_BL & own_BL.any(1)[:, None]].to(tokens_BL.device, non_blocking=True)
        sequences = replace(sequences, keys=seen, key_starts=_starts(seen, tokens_BL.device), key_Y=key_Y)
    return Packed(tokens_BL[there_X, positions_X], positions_X, there_BL, sequences)


def first_with_prompt(tokens_BL: Tensor, prompt_length_B: Tensor) -> Tensor:
    """Number of the first row, for each row, that begins with the same prompt.

    Example:
        >>> first_with_prompt(torch.tensor([[5, 6], [5, 7], [5, 8]]), torch.tensor([1, 2, 1]))
        tensor([0, 1, 0])
    """
    P = int(prompt_length_B.max())
    outside_BP = (torch.arange(P, device=prompt_length_B.device) >= prompt_length_B[:, None]).to(tokens_BL.device)
    group_B: Tensor = tokens_BL[:, :P].masked_fill(outside_BP, -1).unique(dim=0, return_inverse=True)[1]
    group_B = group_B.to(prompt_length_B.device)
    return (group_B[:, None] == group_B).int().argmax(1)


def _starts(lengths: tuple[int, ...], device: torch.device | None) -> Tensor:
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return starts if device is None else starts.to(device, non_blocking=True)
