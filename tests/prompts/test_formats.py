r"""Rows as published data sets have them, read by documented options alone: a right answer is right, a wrong one wrong.

The column names are those of the sets; the words and numbers are our own.
"""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from toys import write_jsonl

from prime_lightning.prompts.arithmetic import build_tokenizer
from prime_lightning.prompts.dataset import DatasetPrompts
from prime_lightning.prompts.published import EurusPrompts
from prime_lightning.prompts.template import Template
from prime_lightning.verifiers import Verifiers

ASK = "What is 6*7?"
SOLUTION = r"Six sevens are $6 \cdot 7 = \boxed{42}$."
TALK = [{"role": "user", "content": f"{ASK} Put it into a box."}]
ANSWERED = [{"role": "user", "content": ASK}, {"role": "assistant", "content": SOLUTION}]
VERL = {
    "data_source": "own",
    "prompt": [{"role": "system", "content": "Think."}, *TALK],
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"index": 0, "split": "train"},
}

ROWS = {
    "NuminaMath-CoT": {"source": "own", "problem": ASK, "solution": SOLUTION, "messages": ANSWERED},
    "NuminaMath-1.5": {"problem": ASK, "solution": SOLUTION, "answer": "42", "problem_type": "Algebra",
         "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "own", "synthetic": False},
    "DeepScaleR": {"problem": ASK, "answer": "42", "solution": SOLUTION},
    "Big-Math": {"problem": ASK, "answer": "42", "source": "own", "domain": ["Arithmetic"], "llama8b_solve_rate": 0.7},
    "OpenR1-Math": {"problem": ASK, "solution": SOLUTION, "answer": "42", "uuid": "1", "generations": [SOLUTION],
         "correctness_math_verify": [True], "messages": ANSWERED},
    "DAPO-Math-17k": {**VERL, "prompt": TALK, "ability": "MATH"},
    "DAPO-Math-17k, processed": {"prompt": ASK, "solution": "42", "data_source": "own", "ability": "MATH",
         "reward_model": {"ground_truth": "42", "style": "rule"}},
    "Skywork-OR1": {**VERL, "ability": "math", "reward_model": {"style": "rule", "ground_truth": '["42"]'}},
    "others for verl": {**VERL, "ability": "math"},
    "SimpleRL": {"input": f"<|user|>{ASK}", "answer": "42", "gt_answer": "42", "level": 1, "question": ASK,
         "ground_truth_answer": "42", "target": "42"},
    "SimpleRL-Zoo": {"prompt": [{"content": ASK, "role": "user"}], "ability": "math", "question": ASK,
         "reward_model": {"ground_truth": "42", "style": "rule"}, "extra_info": {"answer": "42", "question": ASK}},
    "OlympiadBench": {"id": 1, "question": ASK, "solution": [SOLUTION], "final_answer": ["$42$"], "error": None,
         "unit": None, "answer_type": "Numerical", "is_multiple_answer": False, "context": None},
    "ORZ": [{"from": "human", "value": ASK}, {"from": "assistant", "ground_truth": {"value": "42"}}],
    "GSM8K": {"question": ASK, "answer": "Six sevens are 6*7=<<6*7=42>>42.\n#### 42"},
    "MATH": {"problem": ASK, "level": "Level 1", "type": "Prealgebra", "solution": SOLUTION},
    "AIME": {"ID": "2024-I-1", "Problem": ASK, "Solution": SOLUTION, "Answer": 42},
    "SYNTHETIC-1, mathematics": {"problem_id": "1", "task_type": "verifiable_math", "prompt": ASK, "in_source_id": "7",
         "verification_info": "{'ground_truth': '42'}"},
    "TRL, conversational": {"prompt": TALK, "solution": "42"},
    "TRL, prompt and completion": {"prompt": TALK, "completion": [ANSWERED[1]]},
    "OpenMathInstruct": {"problem": ASK, "generated_solution": SOLUTION, "expected_answer": "42"},
    "OpenThoughts": {"conversations": [{"from": "user", "value": ASK}, {"from": "assistant", "value": SOLUTION}]},
}  # fmt: skip


PAGE = Path(__file__).parents[2] / "docs" / "own_data.md"
LINE = re.compile(r"^\| (?P<names>[^|`]+) \| `[^|]+ \| `(?P<options>\{.*\})`[^`]*(?:`\w+`[^`]*)*\|$", re.MULTILINE)


def documented():
    """The options of each set in the table of the page."""
    found = {}
    for line in LINE.finditer(PAGE.read_text()):
        options = yaml.safe_load(line["options"])
        if "template" in options:
            options["template"] = Template(**options["template"])
        found |= {name.strip(): options for name in line["names"].split("·")}
    return found


@pytest.fixture(scope="module")
def verifiers():
    with Verifiers(workers=1) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer():
    made = build_tokenizer()
    made.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    return made


def graded(prompt, verifiers):
    return [verifiers.verify(prompt, rf"It is \boxed{{{box}}}.").label.value for box in ("42", "41")]


def test_the_page_names_these_sets():
    assert documented().keys() == {*ROWS, "Countdown"}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_published_set_is_asked_and_graded(name, tmp_path, verifiers, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[name]] * 2)
    prompts = DatasetPrompts(path, **documented()[name])
    prompt = prompts.prompt(0, tokenizer)
    assert ASK in prompt.text
    assert "42" not in prompt.text
    assert prompt.answer == "42"
    assert not verifiers.check_references(prompts.references()).bad
    assert graded(prompt, verifiers) == ["correct", "wrong"]


@pytest.mark.parametrize("ability", ["math", "MATH", "Math", "logic", None, "missing"])
def test_rows_for_verl_are_maths_whatever_their_ability(ability, tmp_path, verifiers, tokenizer):
    row = VERL if ability == "missing" else {**VERL, "ability": ability}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    prompt = EurusPrompts(str(tmp_path / "rows.parquet"), revision=None).prompt(0, tokenizer)
    assert (prompt.kind, prompt.answer) == ("math", "42")
    assert prompt.text == f"<system>Think.<user>{TALK[0]['content']}"
    assert graded(prompt, verifiers) == ["correct", "wrong"]


@pytest.mark.parametrize("ability", ["code", "coding", None, "missing"])
def test_rows_for_verl_with_tests_are_code(ability, tmp_path, tokenizer):
    row = {
        **VERL,
        "reward_model": {"style": "rule", "ground_truth": json.dumps({"inputs": ["4\n"], "outputs": ["2\n"]})},
    }
    row = row if ability == "missing" else {**row, "ability": ability}
    prompts = EurusPrompts(write_jsonl(tmp_path / "rows.jsonl", [row, {**VERL, "ability": "math"}]), revision=None)
    made = {prompt.kind: prompt for prompt in (prompts.prompt(draw, tokenizer) for draw in (0, 1))}
    assert (made["code"].answer, made["code"].row["inputs"], made["math"].answer) == ("", ["4\n"], "42")


@pytest.mark.parametrize("truth", [None, "", {"target": 24, "numbers": [1, 2]}])
def test_a_verl_row_without_a_truth_to_compare_with_is_named(truth, tmp_path):
    row = {**VERL, "reward_model": {"style": "rule", "ground_truth": truth}}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, row])
    with pytest.raises(ValueError, match=r"in 2 of 2 .*(row 0|rows \[0, 1\])"):
        EurusPrompts(path, revision=None)


def countdown(prompt, text):
    """A verifier of one's own: it gets the row, and the mapping as JSON."""
    truth = json.loads(prompt.answer)
    return float(str(truth["target"]) in text and prompt.row["target"] == truth["target"])


def makes(prompt, text):
    """Another, for rows whose answer is a number to be made: the numbers are in the row."""
    made, _, target = text.partition("=")
    numbers = sorted(int(number) for number in made.split("*"))
    return float(target == prompt.answer and numbers == sorted(prompt.row["nums"]))


def test_countdown_is_for_a_verifier_of_ones_own(tmp_path, tokenizer, verifiers):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"target": 24, "nums": [4, 6]}])
    options = documented()["Countdown"]
    prompt = DatasetPrompts(path, **{**options, "kind": "test_formats.makes"}).prompt(0, tokenizer)
    assert prompt.text == "<user>Make 24 of [4, 6]."
    assert [verifiers.verify(prompt, text).score for text in ("6*4=24", "3*8=24")] == [1.0, 0.0]
    with pytest.raises(ValueError, match="without the reference"):
        DatasetPrompts(path, columns={"answer": "target"}, template=Template(user="Make {target} of {nums}."))


def test_a_mapping_is_for_a_verifier_of_ones_own(tmp_path, tokenizer, verifiers):
    mapping = {"target": 24, "numbers": [4, 6]}
    path = write_jsonl(tmp_path / "rows.jsonl", [{**mapping, "truth": mapping}])
    template = Template(user="Make {target} of {numbers}.")
    prompts = DatasetPrompts(path, kind="test_formats.countdown", columns={"answer": "truth"}, template=template)
    prompt = prompts.prompt(0, tokenizer)
    assert prompt.text == "<user>Make 24 of [4, 6]."
    assert json.loads(prompt.answer) == mapping
    assert [verifiers.verify(prompt, text).score for text in ("4*6=24", "4+6=10")] == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"a mapping with the fields \['numbers', 'target'\]"):
        DatasetPrompts(path, columns={"answer": "truth"}, template=template)


NONE = [
    {"problem": ASK, "answer": "42", "solution": SOLUTION},
    {"problem": "Show it.", "answer": None, "solution": "It is plain."},
    {"problem": "Show it.", "answer": "proof", "solution": "It is plain."},
]


def test_rows_without_an_answer_are_named_and_left_out_on_request(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", NONE)
    options = {"columns": {"answer": "solution"}, "answer_pattern": "boxed", "shuffle": False}
    with pytest.raises(ValueError, match=r"none in 2 of 3 rows .*row 1: nothing that matches .*drop_unanswered: true"):
        DatasetPrompts(path, **options)
    with pytest.warns(UserWarning, match="Left out, for want of an answer: in 2 of 3 rows"):
        assert len(DatasetPrompts(path, drop_unanswered=True, **options)) == 1
    with pytest.raises(ValueError, match=r"none in 1 of 3 \(rows \[1\]"):
        DatasetPrompts(path)
    with pytest.warns(UserWarning, match="row 1: no answer"):
        kept = DatasetPrompts(path, drop_unanswered=True)
    with Verifiers(workers=1) as verifiers:
        assert "rows row 1 (no answer, but 'proof')" in str(verifiers.check_references(kept.references()))
