"""Is a problem of a benchmark among the training prompts: equal when normalised, or sharing most of its n-grams.

Normalisation leaves letters and digits: case, white space, punctuation and LaTeX's typography do not tell texts apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

TYPOGRAPHY = re.compile(r"\\(?:left|right|dfrac|tfrac|text|mathrm|textbf|quad|qquad|displaystyle|[,;:!])(?![a-zA-Z])")


def words(text: str) -> list[str]:
    r"""The words and numbers of a text, lower case.

    Example:
        >>> words(r"Find $\left( \tfrac12, x_3 \right)$!")
        ['find', 'frac', '12', 'x', '3']
    """
    plain = unicodedata.normalize("NFKC", text).lower().replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return re.findall(r"[^\W\d_]+|\d+", TYPOGRAPHY.sub(" ", plain))


@dataclass(frozen=True, kw_only=True)
class Match:
    """A training prompt and the problem of a benchmark that stands in it."""

    train: int
    """Row of the training data, from 0."""
    benchmark: str
    problem: int
    """Row of the benchmark, from 0."""
    exact: bool
    """Equal when normalised."""
    share: float
    """Of the problem's n-grams, those that stand in the training prompt."""


class Index:
    """The problems of benchmarks, by their text and by their n-grams.

    Args:
        n: Words of an n-gram; a shorter problem is found by its whole text only.
        share: Least share of a problem's n-grams that makes a match (Lambert et al., arXiv 2411.15124, take 8-grams and
            one half).

    Example:
        >>> index = Index(n=3)
        >>> index.add("quiz", ["How many hens are there on the farm?", "What is 1 + 1?"])
        >>> [(m.problem, m.exact, round(m.share, 2)) for m in index.matches(0, "How many hens are there at home?")]
        [(0, False, 0.5)]
    """

    def __init__(self, n: int = 8, share: float = 0.5) -> None:
        if n < 1 or not 0 < share <= 1:
            raise ValueError(f"Expected n of at least 1 and a share in (0, 1], got {n} and {share}.")
        self.n, self.share = n, share
        self._texts: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        self._grams: defaultdict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
        self._sizes: dict[tuple[str, int], int] = {}

    def add(self, benchmark: str, problems: Iterable[str]) -> None:
        """Add the problems of a benchmark."""
        for number, text in enumerate(problems):
            place, found = (benchmark, number), words(text)
            self._texts["".join(found)].append(place)
            grams = self._grams_of(found)
            self._sizes[place] = len(grams)
            for gram in grams:
                self._grams[gram].append(place)

    def matches(self, row: int, text: str) -> Iterator[Match]:
        """The problems that stand in a training prompt, in the order of the benchmarks."""
        found = words(text)
        equal = set(self._texts.get("".join(found), ()) if found else ())
        shared: Counter[tuple[str, int]] = Counter()
        for gram in self._grams_of(found):
            shared.update(self._grams.get(gram, ()))
        shares = {place: count / self._sizes[place] for place, count in shared.items()}
        for place in sorted(equal | {place for place, share in shares.items() if share >= self.share}):
            share = 1.0 if place in equal else shares[place]
            yield Match(train=row, benchmark=place[0], problem=place[1], exact=place in equal, share=share)

    def _grams_of(self, found: Sequence[str]) -> set[tuple[str, ...]]:
        return {tuple(found[i : i + self.n]) for i in range(len(found) - self.n + 1)}
