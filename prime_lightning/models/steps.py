"""Cut the text of a response into steps, and say to which step each token belongs.

A separator belongs to the step before it, a token to the step that its first character stands in; a token that
contains a separator therefore ends its step, as in PRIME. Every character belongs to exactly one step.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Span = tuple[int, int]
"""First character and the one behind the last."""


@dataclass(frozen=True, kw_only=True)
class StepRule:
    r"""Where a step ends.

    Example:
        >>> text = "First this.\n\nThen\nthat."
        >>> [text[a:b] for a, b in StepRule(rule="blank_line").spans(text)]
        ['First this.\n\n', 'Then\nthat.']
        >>> [text[a:b] for a, b in StepRule(rule="text", separator=".").spans(text)]
        ['First this.', '\n\nThen\nthat.']
    """

    rule: Literal["newline", "blank_line", "text", "regex"] = "blank_line"
    """At each line's end, at blank lines, behind a given text, or behind what a regular expression matches."""
    separator: str = ""
    """The text, or the regular expression, of the rules `text` and `regex`."""

    def __post_init__(self) -> None:
        if self.rule in ("text", "regex") and not self.separator:
            raise ValueError(f"Expected `steps.separator` for the step rule {self.rule!r}, got none.")
        if self.rule in ("newline", "blank_line") and self.separator:
            raise ValueError(
                f"Expected no `steps.separator` for the step rule {self.rule!r}, got {self.separator!r}. "
                'Take the rule "text" or "regex".'
            )
        try:
            matches_nothing = re.fullmatch(self.pattern, "") is not None
        except re.error as error:
            raise ValueError(
                f"Expected a regular expression in `steps.separator`, got {self.separator!r}: {error}"
            ) from None
        if matches_nothing:
            raise ValueError(f"Expected a step separator of at least one character, got {self.separator!r}.")

    @property
    def pattern(self) -> str:
        """The rule as a regular expression over one separator."""
        return {
            "newline": r"\n(?:[^\S\n]*\n)*",
            "blank_line": r"\n(?:[^\S\n]*\n)+",
            "text": re.escape(self.separator),
            "regex": self.separator,
        }[self.rule]

    def spans(self, text: str) -> list[Span]:
        """The steps of a text, in order and without gaps; one step where there is no separator."""
        spans, start = [], 0
        for match in re.finditer(rf"(?:{self.pattern})+", text):
            if text[start : match.start()].strip() and match.end() > match.start():
                spans.append((start, match.end()))
                start = match.end()
        if text[start:].strip() or not spans:
            return [*spans, (start, len(text))]
        return [*spans[:-1], (spans[-1][0], len(text))]  # white space at the end belongs to the last step


def steps_of_tokens(starts: Sequence[int], spans: Sequence[Span]) -> list[int]:
    """Number of the step of each token, from the character that each token starts at.

    Example:
        >>> steps_of_tokens([0, 3, 5], [(0, 4), (4, 9)])
        [0, 0, 1]
    """
    ends = [end for _, end in spans]
    return [min(bisect_right(ends, start), len(ends) - 1) for start in starts]
