"""The embedded task: true results, an imperfect teacher, a tokenizer of characters, endless fresh problems."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.prompts.arithmetic import (
    DIGITS,
    OPERATIONS,
    ArithmeticLessons,
    ArithmeticPrompts,
    Chains,
    Teacher,
    build_tokenizer,
    step_truth,
    write_model,
)

tasks = st.builds(Chains, operations=st.integers(1, 12), modulus=st.integers(2, 32))


def by_python(problem, modulus):
    """Running results by Python's own evaluation of ever longer pieces of the problem."""
    first, *steps = re.findall(r"[-+*]?[0-9a-v]", problem)
    expression, results = str(DIGITS.index(first)), []
    for step in steps:
        expression = f"({expression}) {step[0]} {DIGITS.index(step[1])}"
        results.append(eval(expression) % modulus)
    return results


@given(tasks, st.integers(0, 2**32))
def test_results_are_pythons(chains, seed):
    problem = chains.problem(np.random.default_rng(seed))
    assert re.fullmatch(r"\^[0-9a-v]([-+*][0-9a-v])*=", problem)
    assert len(problem) == 3 + 2 * chains.operations
    assert chains.results(problem) == by_python(problem, chains.modulus)


def test_problems_use_all_digits_and_operations():
    chains = Chains(operations=10, modulus=10)
    text = "".join(chains.problem(np.random.default_rng(seed)) for seed in range(300))
    seen = {(o, d): text.count(o + d) for o in OPERATIONS for d in DIGITS[:10]}
    assert all(seen[o, "0"] == 0 for o in OPERATIONS)  # as an operand 0 would erase or repeat
    assert all(60 < seen[o, d] < 160 for o, d in seen if d != "0")  # 3000 / 27 = 111 each
    assert {text[i + 1] for i in range(len(text)) if text[i] == "^"} == set(DIGITS[:10])


@pytest.mark.parametrize("modulus", [1, 33])
def test_a_modulus_without_digits_is_refused(modulus):
    with pytest.raises(ValueError, match=rf"modulus in 2..32, got {modulus}"):
        Chains(modulus=modulus)


@given(st.integers(0, 2**32))
def test_a_perfect_teacher_writes_the_solution_and_each_step_of_it_is_true(seed):
    chains = Chains(operations=5)
    rng = np.random.default_rng(seed)
    problem = chains.problem(rng)
    answer = Teacher(chains=chains, shaky=0.0, reliability=1.0).solve(problem, rng)
    results = by_python(problem, 10)
    assert answer == "".join(f"{r};" for r in results) + f"#{results[-1]}"
    assert step_truth(problem, answer, chains) == [True] * 5


def facts_of(teacher, lessons):
    """For each fact (operation, left, right): how often it was right, how often not, and the wrong results."""
    seen = {}
    for index in range(lessons):
        rng = np.random.default_rng(index)
        problem = teacher.chains.problem(rng)
        answer = teacher.solve(problem, rng)
        left = DIGITS.index(problem[1])
        steps = zip(problem[2:-1:2], problem[3:-1:2], answer.split("#")[0].split(";")[:-1], strict=True)
        for operation, right, written in steps:
            fact = operation, left, DIGITS.index(right)
            truth = by_python(f"^{DIGITS[left]}{operation}{right}=", teacher.chains.modulus)[0]
            hits, misses, wrong = seen.get(fact, (0, 0, set()))
            ok = DIGITS[truth] == written
            seen[fact] = hits + ok, misses + (not ok), wrong if ok else wrong | {written}
            left = DIGITS.index(written)
    return seen


def test_the_teacher_errs_as_often_as_it_should_and_always_in_the_same_way():
    facts = facts_of(Teacher(chains=Chains(operations=10), reliability=0.985), 6000)
    rates = {fact: hits / (hits + misses) for fact, (hits, misses, _) in facts.items() if hits + misses >= 60}
    assert len(rates) > 250  # of 270 facts
    solid = [rate for rate in rates.values() if rate > 0.955]
    assert 0.6 < len(solid) / len(rates) < 0.8  # 70 % of facts are not shaky
    assert np.mean(solid) == pytest.approx(0.985, abs=0.003)
    shaky = [rate for rate in rates.values() if rate <= 0.955]
    assert np.mean(shaky) == pytest.approx((0.3 + 0.95) / 2, abs=0.06)
    assert min(shaky) > 0.15
    assert all(len(wrong) <= 1 for _, _, wrong in facts.values())  # a habit, not noise


def test_a_teacher_that_is_always_wrong():
    facts = facts_of(Teacher(chains=Chains(operations=4), shaky=0.0, reliability=0.0), 200)
    assert sum(hits for hits, _, _ in facts.values()) == 0


def test_teachers_of_one_seed_have_the_same_habits():
    problem = "^5-8+7*2+1-4*3="
    one, same, other = Teacher(reliability=0.0), Teacher(reliability=0.0), Teacher(reliability=0.0, seed=1)
    answers = [teacher.solve(problem, np.random.default_rng(0)) for teacher in (one, same, other)]
    assert answers[0] == answers[1] != answers[2]


@given(st.integers(0, 2**32), st.integers(0, 99))
def test_step_truth_judges_each_step_by_the_result_before_it(seed, other):
    chains = Chains(operations=6)
    problem = chains.problem(np.random.default_rng(seed))
    written = np.random.default_rng(other).integers(0, 10, 6).tolist()
    lefts = [DIGITS.index(problem[1]), *written]
    expected = [
        eval(f"({left}) {problem[2 + 2 * i]} {problem[3 + 2 * i]}") % 10 == written[i]
        for i, left in enumerate(lefts[:-1])
    ]
    assert step_truth(problem, Chains.solution(written), chains) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("7;4;8;#8", [True, True, True]),
        ("7;4;8;#1", [True, True, True]),  # the steps are right, whatever the final result says
        ("7;4;", [True, True]),
        ("7;4", [True]),  # the second step is not finished
        ("7;;8;#8", [True, False, False]),  # after an unreadable step nothing can be judged
        ("7;44;8;#8", [True, False, False]),
        ("7;v;2;#2", [True, False, False]),  # a digit, but not of this modulus
        ("+;4;8;#8", [False, False, True]),
        ("7;4;8;3;3;#3", [True, True, True]),  # more steps than the problem has
        ("#8", []),
        ("", []),
    ],
)
def test_step_truth_of_odd_answers(answer, expected):
    assert step_truth("^5-8+7*2=", answer, Chains(operations=3)) == expected


@given(st.text(alphabet=DIGITS + OPERATIONS + "=;#^", max_size=40))
def test_the_tokenizer_gives_back_what_it_got(text):
    tokenizer = build_tokenizer()
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) == len(text)
    assert tokenizer.decode(token_ids) == text
    assert (
        tokenizer.decode([*token_ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
    )


def test_prompts_are_endless_fresh_and_independent_of_what_was_drawn_before():
    prompts, tokenizer = ArithmeticPrompts(seed=3), build_tokenizer()
    far = [prompts.prompt(draw, tokenizer) for draw in (10**12, 5, 0)]
    fresh = [ArithmeticPrompts(seed=3).prompt(draw, tokenizer) for draw in (10**12, 5, 0)]
    assert far == fresh
    assert len({prompts.row(draw)["problem"] for draw in range(2000)}) == 2000
    others = {ArithmeticPrompts(seed=4).row(draw)["problem"] for draw in range(2000)}
    assert not others & {prompts.row(draw)["problem"] for draw in range(2000)}
    prompt = fresh[1]
    assert prompt.row["results"] == by_python(prompt.text, 10)
    assert (prompt.answer, prompt.kind) == (DIGITS[prompt.row["results"][-1]], "exact")


def test_lessons_are_problems_with_the_teachers_answers_and_end():
    lessons = ArithmeticLessons(size=50, seed=7, operations=3)
    rows = list(lessons)
    assert len(lessons) == len(rows) == 50
    assert rows == [ArithmeticLessons(size=99, seed=7, operations=3)[i] for i in range(50)]
    assert len({row["problem"] for row in rows}) > 45
    assert all(re.fullmatch(r"(\d;){3}#\d", row["response"]) for row in rows)
    assert 0 < sum(all(step_truth(row["problem"], row["response"])) for row in rows) < 50


def test_lessons_of_another_teacher_are_its_answers():
    perfect = Teacher(shaky=0.0, reliability=1.0, chains=Chains(operations=99))
    rows = list(ArithmeticLessons(size=50, seed=7, operations=3, modulus=16, teacher=perfect))
    chains = Chains(operations=3, modulus=16)
    assert [row["response"] for row in rows] == [chains.solution(chains.results(row["problem"])) for row in rows]


def test_the_model_folder_is_a_hugging_face_folder(tmp_path):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(9)
        write_model(tmp_path / name, seed=seed, hidden_size=16)
        assert torch.initial_seed() == 9
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    assert tokenizer.decode(tokenizer("^5-8=7;#7")["input_ids"]) == "^5-8=7;#7"
    assert len(tokenizer) == len(states[0]["lm_head.weight"])
