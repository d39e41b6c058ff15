"""Whole groups of rollouts -> the tensors of one PRIME iteration, and ways to cut them up.

Shapes: B responses, L prompt and response tokens, T response tokens. Column t of a `[B, T]` tensor is response token t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from prime_lightning.algorithms.measures import Measures
from prime_lightning.rollout import Group, Rollout

LENGTHS = ("prompt_length_B", "response_length_B")


@dataclass(kw_only=True)
class Batch:
    """The rollouts of one iteration as tensors, all of one device but for the lengths, which stay on the host.

    They say how a batch is cut up and laid out. A host that asks a device waits for all the work before.
    """

    tokens_BL: Tensor
    """Prompt and response, zeros behind."""
    prompt_length_B: Tensor
    response_length_B: Tensor
    mask_BT: Tensor
    """True on every response token of a response with a verdict."""
    outcome_B: Tensor
    """Verifier's score in [0, 1]; 0 where unknown."""
    valid_B: Tensor
    """False where the verdict is unknown, or the response is left out for being truncated."""
    group_B: Tensor
    """Number of the prompt among those of all ranks, equal within a group; -1 for a row that stands for no prompt."""
    behaviour_logprobs_BT: Tensor
    """Engine's log-probs of the distribution that was sampled from, nats."""
    version_BT: Tensor
    """Version of the weights that sampled each token."""
    temperature: float = 1.0
    """Of the sampling; the policy's log-probs are taken at the same."""
    masked: bool = False
    """Whether ids without a token were left out of the distribution that was sampled from."""
    truncation: float = 0.0
    """Most nats by which the sampling raised a token's log-prob over the policy's, see `Sampling.truncation`."""
    rollouts: list[Rollout] = field(default_factory=list)
    """The same as objects, row by row, for logs."""
    metrics: Measures = field(default_factory=Measures)
    """What the data module measured while it made this batch."""
    rejected: Batch | None = None
    """Groups that the accuracy filter rejected while this batch was filled, for a PRM that learns from all; a rank
    without any has one row that counts for nothing. None where nobody asked for them."""
    accepted: int | None = None
    """Groups of all ranks that the accuracy filter kept, where others with higher numbers came in beside them, which
    earn by the process reward alone. None where all were kept."""

    def __len__(self) -> int:
        """Number of responses."""
        return len(self.outcome_B)

    @property
    def plain(self) -> bool:
        """Whether the distribution that was sampled from is the model's own, but for top-p and top-k."""
        return self.temperature == 1.0 and not self.masked

    @property
    def groups(self) -> int:
        """Number of prompts on this rank."""
        return len(self.numbers())

    def numbers(self) -> list[int]:
        """Numbers of the prompts on this rank, in order."""
        return [number for number in self.group_B.unique().tolist() if number >= 0]

    def response_tokens(self) -> Tensor:
        """`[B, T]` tokens of the responses; what stands outside of them means nothing."""
        columns_BT = self.prompt_length_B[:, None] + torch.arange(self.mask_BT.shape[1])
        columns_BT = columns_BT.clamp_max(self.tokens_BL.shape[1] - 1)
        return self.tokens_BL.gather(1, columns_BT.to(self.tokens_BL.device, non_blocking=True))

    @classmethod
    def of_groups(
        cls,
        groups: Sequence[Group],
        *,
        keep_truncated: bool = True,
        temperature: float = 1.0,
        masked: bool = False,
        truncation: float = 0.0,
        metrics: Measures | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Batch:
        """Lay out whole groups as tensors.

        Args:
            groups: Rollouts of one prompt each.
            keep_truncated: Learn from responses that hit the token limit; otherwise they are masked out.
            temperature: Of the sampling.
            masked: Whether the sampling had `mask_padding`.
            truncation: Of the sampling.
            metrics: Carried along.
            rank: Which rank this is; group i gets the number `i * world + rank`.
            world: Number of ranks.

        Raises:
            ValueError: if there is no group.
        """
        if not groups:
            raise ValueError("Expected at least one group of rollouts to make a batch of, got none.")
        rollouts = [rollout for group in groups for rollout in group]
        valid = [r.verdict.known and (keep_truncated or not r.completion.truncated) for r in rollouts]
        response_length_B = torch.tensor([len(r.completion.token_ids) for r in rollouts])
        valid_B = torch.tensor(valid)
        return cls(
            tokens_BL=pad([[*r.prompt.token_ids, *r.completion.token_ids] for r in rollouts], torch.long),
            prompt_length_B=torch.tensor([len(r.prompt.token_ids) for r in rollouts]),
            response_length_B=response_length_B,
            mask_BT=inside(response_length_B) & valid_B[:, None],
            outcome_B=torch.tensor([r.verdict.known_score or 0.0 for r in rollouts]),
            valid_B=valid_B,
            group_B=torch.tensor([i * world + rank for i, group in enumerate(groups) for _ in group]),
            behaviour_logprobs_BT=pad([r.completion.logprobs for r in rollouts], torch.float32),
            version_BT=pad([r.completion.versions for r in rollouts], torch.long),
            temperature=temperature or 1.0,
            masked=masked,
            truncation=truncation,
            rollouts=rollouts,
            metrics=metrics or Measures(),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; to a GPU by way of pinned memory, without waiting for it."""
        moved = [f.name for f in fields(self) if f.type == "Tensor" and f.name not in LENGTHS]
        tensors: dict[str, Any] = {name: _moved(getattr(self, name), device) for name in moved}
        return replace(self, **tensors, rejected=None if self.rejected is None else self.rejected.to(device))

    def select(self, rows: Tensor) -> Batch:
        """These responses only, without the columns that they do not need.

        Args:
            rows: On the host.
        """
        prompt_length_B, response_length_B = self.prompt_length_B[rows], self.response_length_B[rows]
        L, T = int((prompt_length_B + response_length_B).max()), int(response_length_B.max())
        width = {"tokens_BL": L, "mask_BT": T, "behaviour_logprobs_BT": T, "version_BT": T}
        there = rows.to(self.tokens_BL.device, non_blocking=True)
        names = [f.name for f in fields(self) if f.type == "Tensor"]
        cut = {name: getattr(self, name)[rows if name in LENGTHS else there] for name in names}
        cut |= {name: cut[name][:, :columns] for name, columns in width.items()}
        kept = [self.rollouts[i] for i in rows.tolist()] if self.rollouts else []
        return replace(self, **cut, rollouts=kept, rejected=None)

    def nothing(self) -> Batch:
        """One row of two tokens that counts for nothing: it takes part in forwards that other ranks have work for."""
        first, one = torch.zeros(1, dtype=torch.long), self.prompt_length_B.new_ones(1)
        row = replace(self.select(first), prompt_length_B=one, response_length_B=one).select(first)
        return replace(row.uncounted(), group_B=torch.full_like(row.group_B, -1))

    def uncounted(self) -> Batch:
        """The same rows, none of which counts: for a rank that has none left while others have."""
        return replace(self, mask_BT=self.mask_BT & False, valid_B=self.valid_B & False, rollouts=[])

    def of_accepted(self) -> Batch:
        """The same rows, of which only those count that the accuracy filter kept."""
        if self.accepted is None:
            return self
        kept_B = self.group_B < self.accepted
        return replace(self, valid_B=self.valid_B & kept_B, mask_BT=self.mask_BT & kept_B[:, None])

    def minibatches(self, count: int, generator: torch.Generator, groups: int | None = None) -> list[Tensor]:
        """Shuffle the groups of all ranks into `count` equal parts; returns this rank's rows of each, on the host.

        The parts do not depend on which rank has which group; a rank may have no rows of one.

        Args:
            count: Number of parts.
            generator: Of the same state on all ranks.
            groups: Groups on all ranks, numbered from 0; this rank's by default.

        Raises:
            ValueError: if there are fewer groups than parts.
        """
        groups = self.groups if groups is None else groups
        if groups < count:
            raise ValueError(
                f"Expected at least one prompt for each of {count} minibatches, got {groups} prompts. "
                "Lower `minibatches` or raise `data.prompts_per_batch`."
            )
        order, group_B = torch.randperm(groups, generator=generator), self.group_B.cpu()
        return [torch.isin(group_B, part).nonzero().squeeze(-1) for part in order.tensor_split(count)]

    def microbatches(
        self, rows: Tensor, token_budget: int, *, whole_groups: bool = False, shared_prompts: bool = False
    ) -> Iterator[Tensor]:
        """Cut rows, on the host, into parts of at most `token_budget` tokens; one unit always fits.

        Units are responses, or whole groups. Padding counts, and units of similar length come together, so that little
        is padding. With shared prompts there is none: a prompt counts once, and its responses come together.
        """
        prompt: list[int] = self.prompt_length_B[rows].tolist()
        response: list[int] = self.response_length_B[rows].tolist()
        group: list[int] = self.group_B.cpu()[rows].tolist()

        def longest(unit: list[int]) -> int:
            return max(prompt[i] + response[i] for i in unit)

        def grown(part: list[int], tokens: int, unit: list[int]) -> int:
            if not shared_prompts:
                return (len(part) + len(unit)) * longest(unit)
            new = not part or group[part[-1]] != group[unit[0]]
            return tokens + sum(response[i] for i in unit) + prompt[unit[0]] * new

        part: list[int] = []
        tokens = 0
        units = _members(group) if whole_groups else [[i] for i in range(len(rows))]
        for unit in sorted(units, key=lambda unit: (shared_prompts and group[unit[0]], longest(unit))):
            if part and grown(part, tokens, unit) > token_budget:
                yield rows[part]
                part, tokens = [], 0
            tokens = grown(part, tokens, unit)
            part += unit
        if part:
            yield rows[part]


def _members(group: Sequence[int]) -> list[list[int]]:
    """Places of each group, by the groups' numbers."""
    found: dict[int, list[int]] = {number: [] for number in sorted(set(group))}
    for place, number in enumerate(group):
        found[number].append(place)
    return list(found.values())


def join(parts: Sequence[Batch], like: Batch) -> Batch:
    """One batch of the rows of several, padded to the longest.

    Args:
        parts: At least one.
        like: Where temperature and measures come from.
    """
    tensors: dict[str, Any] = {
        f.name: padded_cat([getattr(part, f.name) for part in parts]) for f in fields(Batch) if f.type == "Tensor"
    }
    rollouts = [rollout for part in parts for rollout in part.rollouts]
    return replace(like, **tensors, rollouts=rollouts, rejected=None)


def renumbered(batch: Batch, numbers: list[int], first: int) -> Batch:
    """The same rows, whose group is `first` and on by its place among these numbers."""
    place_B = torch.searchsorted(torch.tensor(numbers, device=batch.group_B.device), batch.group_B)
    return replace(batch, group_B=first + place_B)


def padded_cat(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; those of two dimensions are padded with zeros to the widest.

    Example:
        >>> padded_cat([torch.tensor([[1, 2]]), torch.tensor([[3]])])
        tensor([[1, 2],
                [3, 0]])
    """
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def inside(length_B: Tensor) -> Tensor:
    """`[B, T]` True on the tokens of each row, False in its padding.

    Example:
        >>> inside(torch.tensor([2, 1]))
        tensor([[ True,  True],
                [ True, False]])
    """
    return torch.arange(int(length_B.max())) < length_B[:, None]


def pad(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """Lists of different lengths as one tensor, zeros behind.

    Example:
        >>> pad([[1, 2], [3]], torch.long)
        tensor([[1, 2],
                [3, 0]])
    """
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. The host may forget what it pinned: the allocator keeps it until the copy is done."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
