"""The benchmark on word problems: lessons from equations, its stages in their smallest form, and whom it blames."""

import itertools
import json
import math
import random
import re
import statistics
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import sympy
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import models
import word_problems
import word_problems_credit as blame
import word_problems_lessons as teach
import word_problems_practice as mislead
import word_problems_stories as tell
import word_problems_summary

from prime_lightning.__main__ import main
from prime_lightning.cli.lightning_cli import lightning
from prime_lightning.prm.implicit import Scored
from prime_lightning.report.runs import read_metrics
from prime_lightning.rollout import Prompt
from prime_lightning.verifiers import Verifiers

SETTINGS = yaml.safe_load(word_problems.SETTINGS.read_text())
NAMES = ["Ann", "Bo", "Cy"]


def problems(count):
    """Rows of two steps."""
    for i in range(count):
        a, b, c = 3 + i % 7, 2 + i % 5, 1 + i % 4
        text = f"{NAMES[i % 3]} has {a} bags of {b} eggs and eats {c} eggs. How many are left?"
        yield {"problem": text, "answer": str(a * b - c), "equation": "- * number0 number1 number2"}


def simple(count):
    """Rows of one step, every other with a number too many."""
    for i in range(count):
        text = f"{NAMES[i % 3]} has {9 + i} eggs and eats {1 + i % 4}" + (", says one of 7 men." if i % 2 else ".")
        yield {"problem": text, "answer": str(8 + i - i % 4), "equation": "- number0 number1"}


@pytest.fixture(scope="module")
def small(tmp_path_factory, chat_model):
    """The shipped settings, cut down; files of made-up problems; and the options that name them."""
    folder = tmp_path_factory.mktemp("words")
    settings = json.loads(json.dumps(SETTINGS))
    cpu = settings["cpu"]
    cpu |= {"lessons": 8, "of_each": 10, "variants": 1, "stories": 3, "held_out": 4, "save_every": 1}
    cpu["warm"]["data"]["batch_size"] = 4
    cpu["rl"]["trainer"]["max_steps"] = 2
    for adapters in ("policy_lora", "prm_lora"):
        cpu["rl"]["model"][adapters]["target_modules"] = r".*\.layers\.1\..*_proj"  # its upper half
    cpu["rl"]["data"] |= {"prompts_per_batch": 2, "sampling": {"samples": 4, "max_tokens": 6}}
    cpu["evaluation"] |= {"limit": 2, "max_tokens": 6}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    teach.write(folder / "train.jsonl", [*problems(4), *simple(12), *problems(4)])
    teach.write(folder / "test.jsonl", problems(1000))
    files = ["--train", str(folder / "train.jsonl"), "--test", str(folder / "test.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    config = AutoConfig.from_pretrained(chat_model, vocab_size=len(tokenizer), tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return [*files, "--settings", str(folder / "settings.yaml"), "--model", str(folder / "model")]


def noted(out):
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_all_stages_run_once_and_are_told(small, tmp_path, capsys):
    words = [*small, "--out", str(tmp_path)]
    for stage in (["warm"], ["rl", "--method", "rloo"], ["rl"], ["eval"], ["credit"]):
        word_problems.main([*stage, *words])
    stages = noted(tmp_path)
    assert [one["stage"] for one in stages] == ["warm", "rl", "rl", *["eval"] * 4, "credit"]
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 10 + 3  # of one step, and stories
    assert stages[0]["lessons"] == 8
    for run in stages[1:3]:
        assert run["curve"]["rollout/responses"] == [8.0, 8.0]  # equal cost
        assert bool(run["curve"]["prm/ce"]) == (run["method"] == "prime")
    assert {one["model"] for one in stages[3:7]} == {"untrained", "warm", "rloo-seed0", "prime-seed0"}
    told = capsys.readouterr().out
    assert "| SVAMP, greedy |" in told
    assert "| prime, seed 0 |" in told
    word_problems.main(["rl", *words])
    assert "done before" in capsys.readouterr().out
    assert noted(tmp_path) == stages


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(small, tmp_path):
    outs = [tmp_path / "whole", tmp_path / "stopped"]
    for out in outs:
        word_problems.main(["warm", *small, "--out", str(out)])
    options = word_problems.parser().parse_args(["rl", *small, "--out", str(outs[1])])
    settings = yaml.safe_load(Path(options.settings).read_text())
    configs, layer = word_problems.rl_layers(options, settings, outs[1])
    folder = word_problems.folder_of(outs[1], options)
    folder.mkdir()
    (folder / "layer.yaml").write_text(
        yaml.safe_dump(word_problems.merged(layer, word_problems.placed("fit", folder, 1)))
    )
    lightning([*word_problems.command("fit", configs, folder, 0), "--trainer.max_steps", "1"])
    for out in outs:
        word_problems.main(["rl", *small, "--out", str(out)])
    whole, stopped = (weights(out / "prime-seed0" / "policy") for out in outs)
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    curves = [noted(out)[1]["curve"] for out in outs]
    assert curves[0] == curves[1]
    assert list(read_metrics(folder / "csv" / "version_1" / "metrics.csv")) == [1]  # the second iteration alone
    assert not (folder / "checkpoints").exists()


QWEN_1_5B = models.QWEN | {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
}  # fmt: skip


@pytest.mark.parametrize("method", ["rloo", "prime"])
@pytest.mark.parametrize(("device", "gib", "fits"), [("cuda24", 24, 0), ("cuda80", 80, 0), ("cuda80", 24, 1)])
def test_the_settings_for_a_card_fit_it(device, gib, fits, method, tmp_path):
    options = word_problems.parser().parse_args(["rl", "--device", device, "--method", method])
    configs, layer = word_problems.rl_layers(options, SETTINGS, tmp_path)
    layer = word_problems.merged(layer, word_problems.placed("fit", tmp_path, 20))
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(layer))
    shape = {"model_type": "qwen2", "tie_word_embeddings": True, **QWEN_1_5B}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    words = [word for path in (*configs, tmp_path / "layer.yaml") for word in ("--config", str(path))]
    assert main(["plan", *words, "--gpu-memory", str(gib), "--model-config", str(tmp_path / "config.json")]) == fits


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


@given(st.integers(0, 19), st.integers(0, 5), st.integers(1, 50), st.booleans())
def test_the_first_wrong_word_is_blamed_and_what_follows_is_left_out(which, place, off, swapped):
    row = list(problems(20))[which]
    way = list(teach.checked(row).ways())[swapped]
    words = teach.worked(way).split()
    assert blame.word_truths(words, row) == [True] * len(words)
    broken = [*words[:place], str(1000 + off), *words[place + 1 :]]
    assert blame.word_truths(broken, row) == [True] * place + [False]


def test_rewards_of_words_are_the_sums_of_their_tokens():
    tokens = ["Add", ":", " \\boxed{2", " *", " 1", "2}", " <", "<end>"]
    rewards = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    one = Scored(tokens=tokens, token_rewards=rewards, steps=[], step_rewards=[], step_tokens=[], reward=255.0)
    row = {"problem": "2 and 3", "answer": "5", "equation": "+ number0 number1"}
    parts = blame.judged_words("Add: \\boxed{2 * 12} <", one, row)
    assert parts.truths == [True, True, False]
    assert parts.rewards == [3, 4, 8]


def test_the_interval_of_an_auc_holds_it_and_narrows():
    parts = [blame.Parts(truths=[True, True, False], rewards=[0.3, 0.1, r]) for r in (0.0, 0.2, 0.4, 0.2)]
    few, many = (blame.measured(parts * n) for n in (1, 20))
    assert few["auc"] == many["auc"] == 0.5
    assert few["interval"][0] < many["interval"][0] < 0.5 < many["interval"][1] < few["interval"][1]
    assert blame.measured([blame.Parts(truths=[True], rewards=[0.3])])["interval"] is None


@pytest.mark.parametrize(
    ("stage", "train", "said"),
    [
        (["warm"], '{"problem": "2 and 3", "answer": "5"}', "without 'equation'"),
        (["warm"], "# Problems", "a JSON object in line 1"),
        (["warm", "--device", "cuda24"], "{}", "begin with `rl`"),
        (["rl"], "{}", "warm --train FILE"),
        (["credit", "--device", "cuda24"], "{}", "with a warm start"),
        (["credit", "--seed", "3"], "{}", "rl --method prime --seed 3"),
        (["rl", "--settings", "none.yaml"], "{}", "got 'none.yaml'"),
    ],
)
def test_what_is_missing_is_said_in_a_line(stage, train, said, tmp_path):
    (tmp_path / "train.jsonl").write_text(train + "\n")
    words = ["--train", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as error:
        word_problems.main([*stage, *words])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (
            {"cpu": {key: value for key, value in SETTINGS["cpu"].items() if key != "stories"}},
            "to have cpu.stories, as",
        ),
        ({"methods": {"rloo": {}}}, "to have methods.prime, as"),
        ({"methods": None}, "to have methods.rloo, methods.prime, as"),
        (dict.fromkeys(SETTINGS), "to have cpu.model, cpu.configs, "),
    ],
)
def test_settings_of_before_say_what_they_lack(kept, said, tmp_path):
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(SETTINGS | kept))
    with pytest.raises(SystemExit, match=said):
        word_problems.main(["rl", "--settings", str(tmp_path / "old.yaml"), "--out", str(tmp_path)])


def test_the_last_of_a_stage_counts_and_gains_are_points_above_the_warm_start():
    def evaluated(model, right):
        accuracy = sum(right) / len(right)
        result = {"title": "SVAMP", "problems": 10, "metrics": {"accuracy": accuracy}, "interval": {"accuracy": [0, 1]}}
        return {
            "stage": "eval", "model": model, "result": result, "parts": {"few": 0.5, "many": 0.25}, "right": right,
        }  # fmt: skip

    none, some, most = [0.0] * 10, [0.0] * 8 + [1.0] * 2, [1.0, 0.0] * 4 + [1.0, 1.0]
    table = word_problems_summary.summary(
        [evaluated("warm", none), evaluated("warm", some), evaluated("prime-seed0", most), evaluated("untrained", none)]
    )
    assert table.count("| warm |") == 1
    spread = 196 * statistics.stdev([1, 0] * 4 + [0, 0]) / math.sqrt(10)
    gain = f"+40.0 ({40 - spread:+.1f} to {40 + spread:+.1f})"
    assert f"| prime-seed0 | 60.0% (0.0% to 100.0%) | 10 | {gain} | 50.0% | 25.0% |" in table
    assert "| untrained | 0.0% (0.0% to 100.0%) | 10 |  |" in table


def test_a_run_is_told_in_fifths_and_one_without_a_prm_leaves_its_cells_empty():
    curve = {"rollout/responses": [600.0] * 5, "rollout/tokens": [1000.0] * 5, "rollout/accuracy": [0.1, 0.2] * 5}
    judged = {"prm/accuracy": [0.5, 0.6, 0.7, 0.8, 0.9], "process/advantage_share": [0.0, 0.02, 0.04, 0.03, 0.01]}
    stage = {"stage": "rl", "seed": 1, "seconds": 2000.4}
    table = word_problems_summary.summary(
        [stage | {"method": "rloo", "curve": curve}, stage | {"method": "prime", "curve": curve | judged}]
    )
    cost = "| 3,000 | 5,000 | 2,000 |"
    known = "50.0%, 60.0%, 70.0%, 80.0%, 90.0% | 0.0%, 2.0%, 4.0%, 3.0%, 1.0% "
    assert f"| rloo, seed 1 | {', '.join(['15.0%'] * 5)} |  |  {cost}" in table
    assert f"| prime, seed 1 | {', '.join(['15.0%'] * 5)} | {known}{cost}" in table


def test_a_stage_of_an_older_evaluation_leaves_its_cells_empty():
    result = {"title": "SVAMP", "problems": 1, "metrics": {"accuracy": 0.0}, "interval": {"accuracy": [0, 1]}}
    old = {"stage": "eval", "model": "prime-seed0", "result": result}
    new = old | {"model": "warm", "parts": {"few": 0.5}, "right": [0.0]}
    assert "| prime-seed0 | 0.0% (0.0% to 100.0%) | 1 |  |  |" in word_problems_summary.summary([old, new])


def test_other_problems_and_another_warm_start_make_another_run(small, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(word_problems, "once", lambda out, key, run: done.append(key["settings"]))
    monkeypatch.setattr(word_problems, "summary", lambda stages: "")
    (tmp_path / "warm" / "policy").mkdir(parents=True)
    for warm, rows in (("{}", [{"problem": "2"}]), ("{}", [{"problem": "3"}]), ("[]", [{"problem": "2"}])) * 2:
        (tmp_path / "warm" / "policy" / "config.json").write_text(warm)
        teach.write(tmp_path / "train.jsonl", rows)
        word_problems.main(["rl", *small, "--out", str(tmp_path)])
    assert done[:3] == done[3:]
    assert len(set(done)) == 3


def test_models_that_changed_are_asked_and_judged_again(small, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(word_problems, "once", lambda out, key, run: done.append(key))
    monkeypatch.setattr(word_problems, "summary", lambda stages: "")
    folders = [tmp_path / "warm" / "policy", tmp_path / "prime-seed0" / "policy", tmp_path / "prime-seed0" / "prm"]
    for folder in folders:
        folder.mkdir(parents=True)
    for changed in (None, *folders):
        if changed:
            (changed / "config.json").write_text("{}")
        for stage in ("eval", "credit"):
            word_problems.main([stage, *small, "--out", str(tmp_path)])
    asked = {name: [key["settings"] for key in done if key.get("model") == name] for name in ("untrained", "warm")}
    assert len(set(asked["untrained"])) == 1
    assert len(set(asked["warm"])) == 2
    assert len({key["settings"] for key in done if key["stage"] == "credit"}) == 4
