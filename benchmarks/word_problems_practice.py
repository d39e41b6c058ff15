r"""Problems to learn from by rewards: those of one operation, and where it can be, with numbers that do not matter.

SVAMP (Patel et al., arXiv 2103.07191) has problems of one operation and adds to them what does not matter. Few of the
training problems have that: who uses all numbers of a text is right there, and wrong on SVAMP. So what the question
asks for is counted once more, with other numbers of other things, in a sentence more or in the same ones:

    Evelyn has 63 cards. Evelyn has 95 marbles. She gets 9 more from Henry. How many marbles does Evelyn have?
    Evelyn has 95 marbles and 63 cards. She gets 9 more marbles and 12 cards. How many marbles does Evelyn have?
"""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from word_problems_lessons import Calculation, checked, numbers

_SENTENCE = re.compile(r"(?<=[.?!])\s+")
_ASKED = re.compile(r"\bhow many (?:more |fewer |other |of the )?([a-z]+s)\b", re.IGNORECASE)


def practice(rows: Iterable[Mapping[str, Any]], of_each: int, seed: int = 0) -> list[dict[str, Any]]:
    """The problems of one operation, so many of each kind, with numbers too many where that can be.

    Example:
        >>> given = [f"2 {things} came. 3 {things} came. How many {things} came?" for things in ("hens", "cats")]
        >>> given = [{"problem": text, "answer": "5", "equation": "+ number0 number1"} for text in given]
        >>> practice(given, of_each=2)[0]["problem"]
        '2 hens and 57 cats came. 3 hens and 9 cats came. How many hens came?'
    """
    kept = one_step(rows, of_each)
    rng = random.Random(seed)
    things = sorted({thing for row in kept if (thing := asked(row["problem"]))})
    return [{"problem": misleading(row["problem"], things, rng), "answer": row["answer"]} for row in kept]


def one_step(rows: Iterable[Mapping[str, Any]], of_each: int) -> list[Mapping[str, Any]]:
    """The problems of one operation, at most so many of each kind, first those that give a number too many.

    Without those whose answer is rounded, which the verifier does not take for what it computes. Additions are the
    largest part of the file, and most of its differences begin with the number that comes first: who learns from
    rewards for them learns to add, and to begin with that.

    Example:
        >>> given = [("2, 3", "5", "+"), ("2, 3, 9", "5", "+"), ("2, 3", "6", "*")]
        >>> made = [{"problem": p, "answer": a, "equation": f"{sign} number0 number1"} for p, a, sign in given]
        >>> [row["problem"] for row in one_step(made, of_each=1)]
        ['2, 3, 9', '2, 3']
    """
    solved = [(found, row) for row in rows if (found := checked(row)) and found.value == Fraction(row["answer"])]
    single = [(kind(found, row["problem"]), row) for found, row in solved if len(found.operations) == 1]
    single.sort(key=lambda pair: len(numbers(pair[1]["problem"])) <= 2)  # stable: else in their order
    places: defaultdict[object, Iterator[int]] = defaultdict(itertools.count)
    return [row for which, row in single if next(places[which]) < of_each]


def kind(found: Calculation, problem: str) -> tuple[str, bool]:
    """Its operation, and whether a difference or quotient begins with the number that comes later in the text.

    Example:
        >>> kind(Calculation(Fraction(9), "-", Fraction(2)), "Of 2 to 9")
        ('-', True)
    """
    given = numbers(problem)
    backwards = found.left in given and found.right in given[: given.index(found.left)]
    return found.operation, found.operation in "-/" and backwards


def asked(problem: str) -> str | None:
    """What a problem asks for the number of.

    Example:
        >>> asked("How many more hens came?")
        'hens'
    """
    found = _ASKED.search(problem)
    return found[1].lower() if found else None


def misleading(problem: str, things: Sequence[str], rng: random.Random) -> str:
    """A problem of two numbers with more, of other things; as it is where no sentence counts what it asks for.

    Example:
        >>> misleading("Ann has 2 hens. Bo has 3 hens. How many hens are there?", ["cats"], random.Random(0))
        'Ann has 2 hens and 57 cats. Bo has 3 hens and 9 cats. How many hens are there?'
    """
    thing, sentences = asked(problem), _SENTENCE.split(problem)
    counted = re.compile(rf"\d+(?:\.\d+)?( (?:[a-z]+ )?){thing}\b", re.IGNORECASE)
    places = [
        place
        for place, text in enumerate(sentences)
        if "?" not in text and len(numbers(text)) == 1 and counted.search(text)
    ]
    others = [one for one in things if one not in problem.lower()]
    if thing is None or len(numbers(problem)) != 2 or not places or not others:
        return problem
    other = rng.choice(others)
    values = rng.sample([one for one in range(2, 100) if one not in numbers(problem)], 2)
    if rng.random() < 0.5:  # in the same sentences
        form = r"{more} and \g<0>" if rng.random() < 0.5 else r"\g<0> and {more}"
        for place, value in zip(places, values, strict=False):
            sentences[place] = counted.sub(form.format(more=f"{value} {other}"), sentences[place])
    else:  # in one more: before what it repeats or just before the question, so that no later `9 more` is of its things
        place = rng.choice(places)
        before = [place] if numbers(sentences[-1]) else [place, len(sentences) - 1]
        sentences.insert(rng.choice(before), counted.sub(rf"{values[0]}\g<1>{other}", sentences[place]))
    return " ".join(sentences)
