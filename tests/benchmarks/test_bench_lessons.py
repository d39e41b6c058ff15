"""Problems for the benchmark on word problems: lessons from equations, numbers that mislead, and stories."""

import itertools
import random
import re
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from word_rows import problems, simple

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import word_problems_lessons as teach
import word_problems_practice as mislead
import word_problems_stories as tell

from prime_lightning.rollout import Prompt
from prime_lightning.verifiers import Verifiers


def test_a_lesson_says_each_operation_in_its_order():
    row = {"problem": "Of 25000 he spends 1500 in each of 8.", "answer": "13000"}
    (lesson,) = teach.lessons([row | {"equation": "- number0 * number1 number2"}])
    assert lesson == row | {"response": r"Multiply, subtract: \boxed{25000 - (1500 * 8)}"}


def slow(words, given):
    """The value of a prefix equation, by recursion, and the rest of its words."""
    word, *rest = words
    if word not in teach.OPERATIONS:
        return (given[int(word[6:])] if word.startswith("number") else Fraction(word)), rest
    left, rest = slow(rest, given)
    right, rest = slow(rest, given)
    return teach.OPERATIONS[word](left, right), rest


EQUATIONS = st.recursive(
    st.sampled_from(["number0", "number1", "number2", "12.0"]),
    lambda inner: st.tuples(st.sampled_from("+-*/"), inner, inner).map(" ".join),
    max_leaves=6,
).filter(lambda equation: " " in equation)


def solved(equation, values):
    """Its calculation, of a text with these numbers; None where it divides by nothing."""
    text = "There are {} hens, {} eggs and {} men.".format(*values)
    found = teach.calculation(text, equation)
    try:
        return found if [way.value for way in found.ways()] else None
    except ZeroDivisionError:
        return None


VALUES = st.lists(st.integers(1, 99), min_size=3, max_size=3)


@given(EQUATIONS, VALUES)
@settings(deadline=None)
def test_a_calculation_and_what_is_written_of_it_come_to_the_equations_value(equation, values):
    found = solved(equation, values)
    if found is None:
        with pytest.raises(ZeroDivisionError):
            slow(equation.split(), [Fraction(v) for v in values])
        return
    expected, _ = slow(equation.split(), [Fraction(v) for v in values])
    assert found.value == expected
    assert Fraction(str(sympy.sympify(str(found), rational=True))) == expected
    assert sorted(found.operations) == sorted(sign for sign in equation.split() if sign in "+-*/")
    assert found.operations[-1] == equation[0]


@given(EQUATIONS, VALUES)
@settings(deadline=None)
def test_the_ways_of_a_calculation_are_all_orders_of_its_addends_and_factors(equation, values):
    found = solved(equation, values)
    if found is None:
        return
    ways = list(found.ways())
    assert ways[0] == found
    assert len(ways) == 2 ** sum(sign in "+*" for sign in found.operations)
    assert {way.value for way in ways} == {found.value}
    assert {tuple(sorted(re.findall(r"[\d.]+|[-+*/]", str(way)))) for way in ways} == {
        tuple(sorted(re.findall(r"[\d.]+|[-+*/]", str(found))))
    }


def test_the_verifier_computes_what_lessons_have_in_their_box():
    rows = [*problems(6), *simple(6), {"problem": "of 9 a 4th", "answer": "2.25", "equation": "/ number0 number1"}]
    with Verifiers() as verifiers:
        for row, lesson in zip(rows, teach.lessons(rows), strict=True):
            for answer, label in ((row["answer"], "correct"), (row["answer"] + "1", "wrong")):
                prompt = Prompt(draw=0, token_ids=(), text=row["problem"], kind="math", answer=answer)
                assert verifiers.verify(prompt, lesson["response"]).label.value == label


@pytest.mark.parametrize(
    "equation", ["+ number0", "number0 number1", "number0", "+ number0 number9", "+ number0 x", ""]
)
def test_an_equation_that_is_none_gives_no_lesson(equation):
    row = {"problem": "2 and 3", "answer": "5", "equation": equation}
    with pytest.raises(ValueError, match="Expected"):
        teach.calculation(row["problem"], equation)
    assert list(teach.lessons([row])) == []


def test_rl_gets_so_many_problems_of_each_kind_and_those_that_mislead_first():
    rows = [
        {"problem": f"{i + 2} and {j}{more}", "answer": str(answer), "equation": equation}
        for i in range(6)
        for j, more, equation, answer in (
            (1, "", "+ number0 number1", i + 3),
            (1, " and 4", "+ - number0 number1 number2", i - 1),  # two steps
            *([(3, " and 4", "* number0 number2", 4 * (i + 2))] if i % 2 else []),
            (5, " and 7" if i == 4 else "", "- number1 number0", 3 - i),
            (1, "", "- number0 number1", i + 1),
            (6, "", "- number1 number0", 0),  # leads elsewhere but for i = 4
        )
    ]
    chosen = mislead.one_step(rows, 4)
    kinds = [mislead.kind(teach.checked(row), row["problem"]) for row in chosen]
    wanted = {("*", False): 3, ("+", False): 4, ("-", False): 4, ("-", True): 4}
    assert Counter(kinds) == wanted
    assert all(len(teach.checked(row).operations) == 1 for row in chosen)
    misleading = [len(teach.numbers(row["problem"])) > 2 for row in chosen]
    assert misleading == [True] * 4 + [False] * 11
    for part in (chosen[:4], chosen[4:]):
        assert [rows.index(row) for row in part] == sorted(rows.index(row) for row in part)
    assert [row["answer"] for row in chosen[4:] if row["equation"][0] == "+"] == ["3", "4", "5", "6"]
    assert mislead.one_step([], 4) == []


@pytest.mark.parametrize(
    ("equation", "problem", "expected"),
    [
        ("- number0 number1", "9 of 2", ("-", False)),
        ("- number1 number0", "2 of 9", ("-", True)),
        ("/ number2 number0", "2 or 3 of 8", ("/", True)),
        ("+ number1 number0", "2 and 9", ("+", False)),
        ("* number1 number0", "2 by 9", ("*", False)),
        ("- number0 number1", "2 and 2", ("-", False)),
        ("/ number0 7.0", "49 in a week", ("/", False)),
    ],
)
def test_the_kind_of_a_problem_is_its_operation_and_which_number_comes_first(equation, problem, expected):
    assert mislead.kind(teach.calculation(problem, equation), problem) == expected


def test_rl_gets_no_problem_whose_answer_is_rounded():
    rounded = {"problem": "10 by 3", "answer": "3.3333", "equation": "/ number0 number1"}
    assert teach.checked(rounded)
    assert mislead.one_step([rounded], 4) == []


OTHERS = mislead.Others(names=["Ann", "Dan", "Eve"], things=["eggs", "hens", "cats"])


def test_other_things_are_counted_beside_or_in_a_sentence_more():
    given = "Ann has 5 big Eggs. Bo has 7 eggs. Cy has none. How many eggs are there?"
    other = r"(hens|cats)"
    within = [
        rf"Ann has (?P<a>\d+) {other} and 5 big Eggs. Bo has (?P<b>\d+) \2 and 7 eggs. ",
        rf"Ann has 5 big Eggs and (?P<a>\d+) {other}. Bo has 7 eggs and (?P<b>\d+) \2. ",
    ]
    more = [rf"Ann has (?P<a>\d+) big {other}. ", rf"Bo has (?P<a>\d+) {other}. "]
    kept = ["Ann has 5 big Eggs. ", "Bo has 7 eggs. ", "Cy has none. "]
    forms = [form + kept[2] for form in within]
    forms += [more[0] + "".join(kept), "".join(kept) + more[0], kept[0] + more[1] + "".join(kept[1:])]
    forms += ["".join(kept) + more[1]]
    seen = set()
    for seed in range(100):
        made = mislead.other_things(given, OTHERS, random.Random(seed))
        assert made == mislead.other_things(given, OTHERS, random.Random(seed))
        (which,) = (
            i
            for i, form in enumerate(forms)
            if re.fullmatch(form.replace(". ", r"\. ") + r"How many eggs are there\?", made)
        )
        found = teach.numbers(made)
        assert len(set(found)) == len(found) == (4 if which < 2 else 3)
        seen.add(which)
    assert seen == set(range(6))


def test_things_of_another_kind_are_counted_where_the_question_asks_for_one_kind():
    given = "Ann has 5 Eggs. Bo has 7 eggs. How many more eggs has Bo, in red cups?"
    for seed in range(50):
        made = mislead.other_kinds(given, OTHERS, random.Random(seed))
        this, other = re.search(r"How many more (\w+) eggs has Bo, in red cups\?$", made)[1], set()
        for number, kind in re.findall(r"(\d+) (\w+) eggs", made):
            assert (kind == this) == (number in "57")
            other |= {kind} - {this}
        assert len(other) == 1
        assert other | {this} <= set(mislead.KINDS) - {"red"}


def test_other_people_have_or_do_the_same_in_a_sentence_before():
    given = "Bo has 5 eggs. Cy gives Bo 7 eggs. He eats none. How many eggs does Bo have?"
    seen = set()
    for seed in range(50):
        made = mislead.other_people(given, OTHERS, random.Random(seed))
        name, number = re.search(r"(Ann|Dan|Eve)", made)[1], max(set(map(int, re.findall(r"\d+", made))) - {5, 7})
        first, second = f"{name} has {number} eggs. ", f"Cy gives {name} {number} eggs. "
        assert made in (first + given, given.replace("Cy", second + "Cy", 1))
        seen.add(made.startswith(name))
    assert seen == {True, False}


def test_each_way_to_mislead_is_taken_and_no_other():
    given = "Ann has 2 eggs. Bo gives her 3 eggs. How many eggs does Ann have?"
    made = [mislead.misleading(given, OTHERS, random.Random(seed)) for seed in range(60)]
    people = [text for text in made if re.match("Dan|Eve", text)]
    things = [text for text in made if re.search("hens|cats", text)]
    kinds = [text for text in made if not text.endswith("How many eggs does Ann have?")]
    assert min(len(people), len(things), len(kinds)) > 5
    assert len(people) + len(things) + len(kinds) == 60


@given(st.lists(st.integers(1, 999), min_size=2, max_size=2, unique=True), st.integers(0, 1000))
@settings(deadline=None)
def test_practice_keeps_answers_and_the_numbers_that_lead_to_them(values, seed):
    texts = [
        f"{values[0]} {things} came. {values[1]} {things} left. How many {things} stay?" for things in ("hens", "men")
    ]
    rows = [
        {"problem": text, "answer": str(values[0] - values[1]), "equation": "- number0 number1"}
        for text in (*texts, texts[0].replace("hens", "cats"))
    ]
    made = mislead.practice(rows, of_each=3, variants=2, seed=seed)
    assert len({row["problem"] for row in made}) == len(made) == 5
    assert {row["answer"] for row in made} == {str(values[0] - values[1])}
    assert all(
        set(map(Fraction, values)) < set(teach.numbers(row["problem"])) for row in made if row["problem"] != texts[1]
    )
    assert texts[1] in [row["problem"] for row in made]  # men are not a plural with an s


@given(st.integers(0, 10_000))
def test_a_story_gives_at_least_three_numbers_and_two_of_them_answer_it(seed):
    problem, answer = tell.told(random.Random(seed))
    numbers = teach.numbers(problem)
    assert 3 <= len(numbers) == len(set(numbers)) <= 4
    assert re.fullmatch(r"[\w ,.]+\?", problem)
    assert int(answer) > 1
    pairs = itertools.permutations(numbers, 2)
    assert Fraction(answer) in {apply(*pair) for pair in pairs for apply in teach.OPERATIONS.values()}


THING = rf"(?:(?:{'|'.join(tell.TOLD['kinds'])}) )?(?:{'|'.join(tell.TOLD['things'])})"
LOST, FOUND = ("|".join(tell.TOLD[verb]) for verb in ("lost", "found"))
COUNTED = re.compile(rf"(?:Now |Then )?\w+ (has|had|{LOST}|{FOUND}) (?:\d+ {THING}(?:, | and )?)+(?: left)?\.")


def read(sentences):
    """A slow reader of who has, loses and finds what: the stock before, what was moved, and the stock after."""
    before, moved, after = Counter(), Counter(), Counter()
    for sentence in sentences:
        counts = Counter({thing: int(count) for count, thing in re.findall(rf"(\d+) ({THING})", sentence)})
        verb = COUNTED.fullmatch(sentence)[1]
        if verb == "has":
            after = counts
        elif verb == "had":
            before = counts
        else:
            moved, sign = counts, 1 if verb in tell.TOLD["found"] else -1
    for thing in moved:
        before[thing] = before[thing] or after[thing] - sign * moved[thing]
        after[thing] = before[thing] + sign * moved[thing]
    return before, moved, after


def test_stories_are_answered_as_a_slow_reader_does():
    known = 0
    for row in tell.stories(3000, seed=1):
        *sentences, question = re.split(r"(?<=\.) ", row["problem"])
        if not all(map(COUNTED.fullmatch, sentences)):
            continue
        known += 1
        before, moved, after = read(sentences)
        counts = after if "does" in question else before if " have " in question else moved
        assert min(after.values()) > 0
        first, *second = [counts[thing] for thing in re.findall(THING, question)]
        expected = first + sum(second)
        if comparison := re.search("more|fewer", question):
            expected = (first - second[0]) * (1 if comparison[0] == "more" else -1)
        assert str(expected) == row["answer"], row["problem"]
    assert known > 500


def test_every_question_is_asked_and_operations_have_their_shares():
    made = tell.stories(3000, seed=2)
    texts = [row["problem"] for row in made]
    assert len(set(texts)) == 3000
    assert made[:1000] == tell.stories(1000, seed=2)
    for story, question, calculation in tell.QUESTIONS:
        form = re.sub(r"\\\{\w+\\\}", r"[\\w ]+", re.escape(f"{story['text']} {question}"))
        assert any(re.fullmatch(form, text) for text in texts), question
        assert set(calculation[::4]) <= set(re.findall(r"\{([a-d])\}", story["text"]))


@pytest.mark.parametrize(
    "problem",
    [
        "Ann has 2 eggs, 3 hens and 4 cats. How many eggs?",  # has more already
        "Ann has 2 eggs and gets 3 eggs. How many eggs?",  # no sentence with one number
        "Ann has 2 of them. Bo has 3. How many eggs?",  # none that counts what is asked for
        "Ann has 2 eggs. Bo has 3 eggs. What is their price?",  # does not say what it asks for
    ],
)
def test_a_problem_that_cannot_mislead_stays(problem):
    assert mislead.misleading(problem, OTHERS, random.Random(0)) == problem


def test_no_sentence_comes_between_things_and_more_of_them():
    given = "Ann has 2 eggs. If she gets 9 more, how many eggs has she?"
    for seed in range(20):
        made = mislead.other_things(given, mislead.Others([], ["hens"]), random.Random(seed))
        assert re.fullmatch(r"Ann has (\d+ hens\. Ann has 2 eggs|2 eggs and \d+ hens|\d+ hens and 2 eggs)\. .+", made)
        assert made.endswith(given.split(". ")[1])


def test_a_row_whose_equation_leads_elsewhere_gives_no_lesson():
    assert list(teach.lessons([{"problem": "40 by 7", "answer": "5", "equation": "/ number0 number1"}])) == []
