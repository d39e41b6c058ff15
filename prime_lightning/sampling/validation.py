"""A fixed list of prompts -> engine -> verifiers -> unfiltered `Batch`es: validation, test and prediction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property

from prime_lightning.models.batch import Batch
from prime_lightning.rollout import Prompt, Sampling
from prime_lightning.sampling.acceptance import Tally
from prime_lightning.sampling.loader import RolloutSource, Round


class EvaluationLoader:
    """One item = one unfiltered `Batch` of a fixed list of prompts, sampled with the engine's present weights.

    Prompts that do not fit the engine's context are left out and counted.

    Args:
        source: What samples and grades.
        sampling: How completions are drawn.
        count: The first prompts of the source.
        chunk: Prompts of one batch on this rank.
        rank: Which rank this is.
        world: Number of ranks.
    """

    def __init__(
        self, source: RolloutSource, sampling: Sampling, count: int, chunk: int, rank: int, world: int
    ) -> None:
        self.source, self.sampling, self.count = source, sampling, count
        self.chunk, self.rank, self.world = chunk, rank, world

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Those that fit; all ranks know them all.

        Raises:
            ValueError: if there are none.
        """
        longest = self.source.longest_prompt(self.sampling)
        every = [self.source.prompts.prompt(draw, self.source.tokenizer) for draw in range(self.count)]
        long = [prompt.draw for prompt in every if len(prompt.token_ids) > longest]
        limit = f"{longest} tokens, which `max_tokens` {self.sampling.max_tokens} leaves of the engine's context"
        if len(long) == self.count:
            raise ValueError(
                f"Expected prompts to validate with of at most {limit}, got {self.count} longer ones. Lower "
                "`max_tokens` of `data.validation_sampling`."
            )
        if long:
            warnings.warn(
                f"{len(long)} of {self.count} prompts that are not trained on are left out (numbers {long[:10]}): "
                f"they are longer than the {limit}.",
                stacklevel=2,
            )
        return [prompt for prompt in every if len(prompt.token_ids) <= longest]

    def __len__(self) -> int:
        """Number of batches, the same on all ranks."""
        return math.ceil(len(self.prompts) / (self.chunk * self.world))

    def __iter__(self) -> Iterator[Batch]:
        step = self.chunk * self.world
        for start in range(0, len(self.prompts), step):
            mine = self.prompts[start : start + step][self.rank :: self.world]
            long = self.count - len(self.prompts) if start == self.rank == 0 else 0
            yield self._batch(mine, long) if mine else self._batch(self.prompts[:1]).uncounted()

    def _batch(self, prompts: Sequence[Prompt], long: int = 0) -> Batch:
        tally = Tally()
        tally.metrics["rollout/long_prompts"] = long
        with self.source.lock:
            groups = list(Round(self.source, prompts, self.sampling, tally))
        for group in groups:
            tally.add(group, None)
        return Batch.of_groups(groups, metrics=tally.measures())
