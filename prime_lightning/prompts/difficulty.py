"""An order that knows how hard problems were: those that were too easy, or hopeless, come back less often.

A draw stays what it is; some draws are passed over, by the pass rate that the problem had when it was last sampled.
The history is a part of the loader's checkpoint, so a resumed run goes on with the very next prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prime_lightning.prompts.dataset import Prompts
from prime_lightning.rollout import Prompt


class ByDifficulty(Prompts):
    """Rows of another source, less often once their group was all right or all wrong.

    It matters from the second pass over the rows on; each rank knows the groups that it sampled itself, and begins
    anew if the run goes on with another number of ranks.

    Args:
        prompts: The source; a data set or a mixture of some, since endless problems never come back.
        easy: Pass rate from which a problem counts as too easy.
        hopeless: Pass rate up to which a problem counts as hopeless; below 0 none does.
        keep: Share of such problems that is sampled again in each pass, since the policy changes.
        seed: Of the choice.

    Raises:
        ValueError: if `keep` is not in (0, 1], or the bounds cross.

    Example:
        >>> from prime_lightning.prompts.arithmetic import ArithmeticPrompts
        >>> prompts = ByDifficulty(ArithmeticPrompts(), keep=0.001)
        >>> prompts.learn(7, [1.0, 1.0])
        >>> prompts.wanted(7), prompts.wanted(8)
        (False, True)
    """

    def __init__(
        self, prompts: Prompts, easy: float = 1.0, hopeless: float = -1.0, keep: float = 0.25, seed: int = 0
    ) -> None:
        if not 0 < keep <= 1 or hopeless >= easy:
            raise ValueError(f"Expected 0 < keep <= 1 and hopeless < easy, got {keep=}, {hopeless=} and {easy=}.")
        self.prompts, self.easy, self.hopeless, self.keep_share, self.seed = prompts, easy, hopeless, keep, seed
        self.source = prompts.source
        self.pass_rates: dict[int, float] = {}
        """By problem, when it was last sampled."""

    def wanted(self, draw: int) -> bool:
        """Whether the problem was neither too easy nor hopeless, or is due again; and the source wants it."""
        if not self.prompts.wanted(draw):
            return False
        pass_rate = self.pass_rates.get(self.prompts.place(draw))
        if pass_rate is None or self.hopeless < pass_rate < self.easy:
            return True
        return bool(np.random.default_rng([self.seed, draw]).random() < self.keep_share)

    def learn(self, draw: int, outcomes: Sequence[float]) -> None:
        """Remember how the problem went, if anything is known."""
        self.prompts.learn(draw, outcomes)
        if outcomes:
            self.pass_rates[self.prompts.place(draw)] = sum(outcomes) / len(outcomes)

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"pass_rates": dict(self.pass_rates), "source": self.prompts.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a history."""
        self.pass_rates = dict(state.get("pass_rates", {}))
        self.prompts.load_state_dict(state.get("source", {}))

    def parts(self) -> list[Prompts]:
        """The source, or the sources of a mixture."""
        return self.prompts.parts()

    def row(self, draw: int) -> Mapping[str, Any]:
        """The source's."""
        return self.prompts.row(draw)

    def prompt(self, draw: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The source's."""
        return self.prompts.prompt(draw, tokenizer)

    def references(self) -> Iterator[Prompt]:
        """The source's."""
        return self.prompts.references()

    def keep(self, rows: Sequence[int]) -> None:
        """Leave all other rows of the source out."""
        self.prompts.keep(rows)
