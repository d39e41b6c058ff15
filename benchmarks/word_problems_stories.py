"""Short stories of three or four numbers, and questions that two of them answer: more problems to learn from.

SVAMP (Patel et al., arXiv 2103.07191) asks other questions of the same text, changes the order of what a text counts,
and swaps what is given and what is asked for. The training problems have little of that: most give two numbers, and how
they begin says what to do. Here one text has several questions, so that only the question says what to calculate:

    Nora had 19 apples and 8 pears. Nora sold 5 apples and 3 pears. How many apples does Nora have left?
    Nora had 19 apples and 8 pears. Nora sold 5 apples and 3 pears. How many apples and pears did Nora sell?
    Nora had 19 apples and 8 pears. Nora sold 5 apples and 3 pears. How many more apples than pears did Nora sell?

Texts, questions and words stand in word_problems_stories.yaml.
"""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import yaml
from word_problems_lessons import OPERATIONS

TOLD = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
QUESTIONS = [(story, *pair) for story in TOLD["stories"] for pair in story["questions"].items()]
SHARES = "++--*/"  # an operation is drawn from these
BELOW = {"+": (20, 100, 100, 600), "*": (20, 100, 100)}  # numbers are below one of these; quotients are as products
BELOW |= {"-": BELOW["+"], "/": BELOW["*"]}


def stories(count: int, seed: int = 0) -> list[dict[str, str]]:
    """So many problems, no two the same.

    Example:
        >>> stories(1, seed=180)[0]["problem"]
        'Jonas has 10 apples, 5 cakes and 16 eggs. How many cakes and eggs does Jonas have?'
    """
    rng, made = random.Random(seed), {}
    while len(made) < count:
        problem, answer = told(rng)
        made[problem] = answer
    return [{"problem": problem, "answer": answer} for problem, answer in made.items()]


def told(rng: random.Random) -> tuple[str, str]:
    """One question of one text, and its answer, a whole number above 1: a third are sums, a third differences.

    Example:
        >>> told(random.Random(7))[0]
        'David had 376 roses and 598 plums. David gave away 61 roses and 521 plums. How many plums does David have now?'
    """
    operation = rng.choice(SHARES)
    story, question, calculation = rng.choice([asked for asked in QUESTIONS if operation in asked[2]])
    left, right = calculation.split(f" {operation} ")
    below = rng.choice(BELOW[operation])
    while True:
        given = dict(zip("abcd", rng.sample(range(2, below), 4), strict=True))
        answer = OPERATIONS[operation](Fraction(given[left]), Fraction(given[right]))
        fits = all(given[less] < given[more] for less, more in story.get("less", ()))
        if fits and answer > 1 and answer.denominator == 1:
            return f"{story['text']} {question}".format(**given, **words(rng)), str(answer)


def words(rng: random.Random) -> dict[str, str]:
    """Of whom and what a story tells: three things, or three kinds of one.

    Example:
        >>> words(random.Random(0))["x"], words(random.Random(2))["x"]
        ('books', 'sweets')
    """
    people = rng.sample(TOLD["people"], 3)
    thing = rng.choice(TOLD["things"])
    several, kinds = rng.random() < 0.5, TOLD["kinds"]
    things = rng.sample(TOLD["things"], 3) if several else [f"{kind} {thing}" for kind in rng.sample(kinds, 3)]
    verbs = {}
    for past, base in (("lost", "lose"), ("found", "find")):
        verbs[past] = rng.choice(list(TOLD[past]))
        verbs[base] = TOLD[past][verbs[past]]
    return dict(zip("pqrxyz", people + things, strict=True)) | verbs | {"h": rng.choice(TOLD["holders"])}
