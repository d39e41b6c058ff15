r"""Problems to learn from by rewards: those of one operation, and where it can be, with numbers that do not matter.

SVAMP (Patel et al., arXiv 2103.07191) has problems of one operation and adds to them what does not matter. Few of the
training problems have that: who uses all numbers of a text is right there, and wrong on SVAMP. So what the question
asks for is counted once more, with other numbers of other things, in a sentence more or in the same ones:

    Evelyn has 63 cards. Evelyn has 95 marbles. She gets 9 more from Henry. How many marbles does Evelyn have?
    Evelyn has 95 marbles and 63 cards. She gets 9 more marbles and 12 cards. How many marbles does Evelyn have?

or of other things of its kind, or somebody else's:

    Evelyn has 95 red marbles and 63 old marbles. She gets 9 more from Henry. How many red marbles does Evelyn have?
    Fred has 63 marbles. Evelyn has 95 marbles. She gets 9 more from Henry. How many marbles does Evelyn have?
"""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from word_problems_lessons import NUMBER, Calculation, checked, numbers

_SENTENCE = re.compile(r"(?<=[.?!])\s+")
_ASKED = re.compile(r"\bhow many (?:more |fewer |other |of the )?([a-z]+s)\b", re.IGNORECASE)
_PERSON = re.compile(r"\b(?:does|did|do|has|had|have|will|is|was|can|must|should) ([A-Z][a-z]+)\b")
KINDS = ("red", "blue", "green", "yellow", "white", "black", "small", "large", "old", "new", "cheap", "broken")


def practice(rows: Iterable[Mapping[str, Any]], of_each: int, variants: int, seed: int = 0) -> list[dict[str, Any]]:
    """The problems of one operation, so many of each kind, with numbers too many where that can be.

    Example:
        >>> given = [f"2 {things} came. 3 {things} came. How many {things} came?" for things in ("hens", "cats")]
        >>> given = [{"problem": text, "answer": "5", "equation": "+ number0 number1"} for text in given]
        >>> practice(given, of_each=2, variants=1)[0]["problem"]
        '2 small hens and 55 red hens came. 3 small hens and 42 red hens came. How many small hens came?'
    """
    kept = one_step(rows, of_each)
    texts = [row["problem"] for row in kept]
    names, things = (sorted({found for text in texts if (found := find(text))}) for find in (person, asked))
    rng, others = random.Random(seed), Others(names, things)
    made = {misleading(row["problem"], others, rng): row["answer"] for row in kept for _ in range(variants)}
    return [{"problem": problem, "answer": answer} for problem, answer in made.items()]


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


def person(problem: str) -> str | None:
    """Whom the question is about.

    Example:
        >>> person("Ann has 2 hens. How many hens does Ann have?")
        'Ann'
    """
    found = _PERSON.search(_SENTENCE.split(problem)[-1])
    return found[1] if found else None


@dataclass(frozen=True)
class Others:
    """Whom and what a problem can speak of in addition."""

    names: Sequence[str]
    things: Sequence[str]


def misleading(problem: str, others: Others, rng: random.Random) -> str:
    """A problem of two numbers with more, of other people or things; as it is where nothing in it can be counted again.

    Example:
        >>> text = "Ann has 2 hens. Bo gives her 3 hens. How many hens does Ann have?"
        >>> misleading(text, Others(names=["Cid"], things=["cats"]), random.Random(0))
        'Ann has 2 hens and 66 cats. Bo gives her 3 hens and 55 cats. How many hens does Ann have?'
    """
    ways = [one for one in (other_people, other_things, other_kinds) if one(problem, others, random.Random(0))]
    if len(numbers(problem)) != 2 or not ways:
        return problem
    return rng.choice(ways)(problem, others, rng) or problem


def other_people(problem: str, others: Others, rng: random.Random) -> str | None:
    """What the question's person has or does, somebody else has or does too, in a sentence before."""
    name, sentences = person(problem), _SENTENCE.split(problem)
    if name is None:
        return None
    said = re.compile(rf"\b{name}\b")
    places = [i for i, text in enumerate(sentences[:-1]) if said.search(text) and len(numbers(text)) == 1]
    free = [one for one in others.names if one not in problem]
    if not places or not free:
        return None
    place = rng.choice(places)
    copy = said.sub(rng.choice(free), sentences[place])
    sentences.insert(place, NUMBER.sub(new_number(problem, rng), copy))
    return " ".join(sentences)


def other_things(problem: str, others: Others, rng: random.Random) -> str | None:
    """There are so many of another thing, too."""
    free = [one for one in others.things if one not in problem.lower()]
    thing = asked(problem)
    return added(problem, thing, rng.choice(free), rng) if thing and free else None


def other_kinds(problem: str, others: Others, rng: random.Random) -> str | None:
    """The things that the question asks for are of one kind, and there are some of another kind."""
    thing, kinds = asked(problem), [one for one in KINDS if one not in problem.lower()]
    if thing is None:
        return None
    this, other = rng.sample(kinds, 2)
    named = re.sub(rf"\b{thing}\b", f"{this} {thing}", problem, flags=re.IGNORECASE)
    return added(named, f"{this} {thing}", f"{other} {thing}", rng)


def added(problem: str, thing: str, other: str, rng: random.Random) -> str | None:
    """A problem that counts another thing, too, where it counts the one; None where it does not count it."""
    sentences = _SENTENCE.split(problem)
    counted = re.compile(rf"{NUMBER.pattern}( (?:[a-z]+ )?){thing}\b", re.IGNORECASE)
    places = [
        place
        for place, text in enumerate(sentences)
        if "?" not in text and len(numbers(text)) == 1 and counted.search(text)
    ]
    if not places:
        return None
    if rng.random() < 0.5:  # in the same sentences
        form = r"{more} and \g<0>" if rng.random() < 0.5 else r"\g<0> and {more}"
        for place in places:
            sentences[place] = counted.sub(form.format(more=f"{new_number(problem, rng)} {other}"), sentences[place])
    else:  # in one more: before what it repeats or just before the question, so that no later `9 more` is of its things
        place = rng.choice(places)
        before = [place] if numbers(sentences[-1]) else [place, len(sentences) - 1]
        copy = counted.sub(rf"{new_number(problem, rng)}\g<1>{other}", sentences[place])
        sentences.insert(rng.choice(before), copy)
    return " ".join(sentences)


def new_number(problem: str, rng: random.Random) -> str:
    """One that the problem does not give."""
    return str(rng.choice([one for one in range(2, 100) if one not in numbers(problem)]))
