"""Rows as the public code sets have them, in words of our own: each is read, and what cannot be run is named."""
# ruff: noqa: E501

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from prime_lightning.prompts.dataset import DatasetPrompts
from prime_lightning.prompts.published import EurusPrompts
from prime_lightning.prompts.template import Template
from prime_lightning.rollout import Label
from prime_lightning.verifiers import Verifiers
from prime_lightning.verifiers.code.rows import read
from prime_lightning.verifiers.code.tests import task_of

from .conftest import TIERS, prompt

needs_sandbox = pytest.mark.skipif(not TIERS, reason="no sandbox here")
ADD = "def add(a, b):\n    return a + b\n"
METHOD = "class Adder:\n    def add(self, a, b):\n        return a + b\n"
TWICE = "print(int(input()) * 2)"
PRINTS_3 = "print(3)"


def packed(cases: list[dict[str, Any]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


CALL = {"type": "function_call", "fn_name": "add", "input": [1, 2], "output": [3]}
LINES = {"type": "stdin_stdout", "fn_name": None, "input": "4\n", "output": "8\n"}
PYTEST = "from solution import add\n\ndef test_small():\n    assert add(1, 2) == 3\n\ndef test_words():\n    assert add('a', 'b') == 'ab'\n"
UNITTEST = "import unittest\nclass T(unittest.TestCase):\n    def setUp(self): self.one = 1\n    def test_a(self):\n        self.assertEqual(add(self.one, 2), 3)\n\nif __name__ == '__main__':\n    unittest.main()\n"
PLUS = (
    "def assertion(out, exp, atol):\n    assert out == exp\n\ndef check(candidate):\n    inputs = [[1, 2], [0, 0]]\n"
    "    for args, exp in zip(inputs, [3, 0]):\n        assertion(candidate(*args), exp, 0)\n"
)
LIVE = {"question_title": "Twice", "platform": "x", "difficulty": "easy", "starter_code": ""}
# data set -> (row, a program that solves it)
SETS: dict[str, tuple[dict[str, Any], str]] = {
    "KodCode-V1": (
        {
            "question": "Add.", "solution": ADD, "test": PYTEST, "style": "instruct", "subset": "Prefill",
            "test_info": [{"function_name": "add", "parameter_list": "(a, b)", "docstring": None}],
        },
        ADD,
    ),
    "KodCode-V1-SFT": ({"question": "Add.", "solution": "Some words.", "test_code": PYTEST}, ADD),
    "APPS": (
        {"question": "Twice.", "solutions": "[]", "difficulty": "introductory", "starter_code": "",
         "input_output": json.dumps({"inputs": ["4\n", "5\n"], "outputs": ["8\n", "10\n"]})},
        TWICE,
    ),
    "APPS with a function": (
        {"question": "Add.", "starter_code": "def add(a, b):", "solutions": "",
         "input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2], [4, 5]], "outputs": [[3], [9]]})},
        ADD,
    ),
    "TACO": (
        {"question": "Twice.", "input_output": json.dumps({"inputs": ["4"], "outputs": ["8"]}), "tags": "[]", "source": "x"},
        TWICE,
    ),
    "LiveCodeBench": (
        {**LIVE, "public_test_cases": json.dumps([{"input": "4\n", "output": "8\n", "testtype": "stdin"}]),
         "private_test_cases": packed([{"input": "5\n", "output": "10\n", "testtype": "stdin"}]), "metadata": "{}"},
        TWICE,
    ),
    "LiveCodeBench with a function": (
        {**LIVE, "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
         "private_test_cases": packed([{"input": "[1]\n[2]", "output": "[1, 2]", "testtype": "functional"}]),
         "metadata": json.dumps({"func_name": "add"})},
        "class Solution:\n    def add(self, a, b): return a + b\n",
    ),
    "DeepCoder, primeintellect": ({"problem": "Twice.", "solutions": [], "tests": json.dumps([LINES])}, TWICE),
    "DeepCoder, a function": ({"problem": "Add.", "tests": json.dumps([CALL])}, ADD),
    "DeepCoder, a literal of Python": ({"problem": "Add.", "tests": str([CALL])}, METHOD),
    "DeepCoder, taco": ({"problem": "Twice.", "tests": json.dumps({"inputs": ["4\n"], "outputs": ["8\n"]})}, TWICE),
    "DeepCoder, taco with a function": (
        {"problem": "Add.", "tests": json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]})},
        ADD,
    ),
    "DeepCoder, lcbv5": (
        {"problem": "Add.", "starter_code": "class Solution: ...", "metadata": {},
         "tests": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}])},
        METHOD,
    ),
    "DeepCoder, codeforces": ({"problem": "Twice.", "tests": json.dumps([{"input": "4\n", "output": "8\n"}])}, TWICE),
    "SYNTHETIC-1": (
        {"prompt": "Twice.", "task_type": "verifiable_code", "gold_standard_solution": "x",
         "verification_info": json.dumps({"language": "python", "test_cases": [LINES]})},
        TWICE,
    ),
    "SYNTHETIC-1 with a function": (
        {"prompt": "Add.", "verification_info": str({"language": "python", "test_cases": [CALL]})}, ADD,
    ),
    "Eurus-2": (
        {"data_source": "x", "ability": "code", "prompt": [{"role": "user", "content": "Twice."}],
         "reward_model": {"style": "rule", "ground_truth": json.dumps({"inputs": ["4\n"], "outputs": ["8\n"]})}},
        TWICE,
    ),
    "MBPP": (
        {"task_id": 1, "text": "Add.", "code": ADD, "test_list": ["assert add(1, 2) == 3"], "test_setup_code": "", "challenge_test_list": []},
        ADD,
    ),
    "MBPP, sanitized": (
        {"task_id": 1, "prompt": "Add.", "code": ADD, "test_imports": ["import math"], "test_list": ["assert math.isclose(add(1, 2), 3)"]},
        ADD,
    ),
    "HumanEval": (
        {"task_id": "x/0", "prompt": "def add(a, b):\n", "entry_point": "add", "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n"},
        ADD,
    ),
    "HumanEval+": ({"task_id": "x/0", "prompt": "def add(a, b):\n", "entry_point": "add", "test": PLUS}, ADD),
    "LeetCodeDataset": (
        {"entry_point": "Solution().add", "test": "def check(candidate):\n    assert candidate(a=1, b=2) == 3\n", "query": "Add."},
        "class Solution:\n    def add(self, a, b): return a + b\n",
    ),
    "unittest": ({"problem": "Add.", "test": UNITTEST}, ADD),
    "pytest in a list": ({"problem": "Add.", "tests": ["from solution import add", "def test_a():\n    assert add(1, 2) == 3"]}, ADD),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", SETS)
def test_a_row_of_each_public_set(verifiers: Verifiers, name: str, tmp_path: Path) -> None:
    """Through the data set that trains and as `verify` reads it: the right program passes, and no other."""
    row, right = SETS[name]
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    path = str(tmp_path / "data.jsonl")
    shown = next(name for name in ("question", "question_title", "problem", "text", "query", "prompt") if name in row)
    template = Template(user=f"{{{shown}}}")
    data = (
        EurusPrompts(path, revision=None)
        if name == "Eurus-2"
        else DatasetPrompts(path, kind="code", shuffle=False, template=template)
    )
    (trained,) = data.references()
    for asked in (trained, prompt("code", row=row), prompt("code", row=json.loads(json.dumps(row)))):
        assert not verifiers.check_references([asked]).bad
        verdicts = {
            text: verifiers.verify(asked, f"```python\n{text}\n```") for text in (right, PRINTS_3, "print(8)", "")
        }
        assert verdicts.pop(right).label is Label.CORRECT, verdicts
        printed = sum(verdict.score for text, verdict in verdicts.items() if right is not TWICE)
        assert printed == 0, verdicts
        broken = right.replace("a + b", "a - b if type(a) is int else a").replace("* 2", "* 2 + 1")
        assert verifiers.verify(asked, f"```python\n{broken}\n```").label in (Label.WRONG, Label.PARTIAL)


@needs_sandbox
@pytest.mark.parametrize("name", [name for name in SETS if SETS[name][1] == TWICE])
def test_tests_as_json_in_the_answer(verifiers: Verifiers, name: str) -> None:
    """As PRIME's Eurus-2-RL data: whether `answer` reaches us as a field or in the row, as text or as a mapping."""
    held = {"inputs": ["4\n"], "outputs": ["8\n"]}
    for asked in (
        prompt("code", json.dumps(held)),
        prompt("code", row={"answer": json.dumps(held)}),
        prompt("code", row={"answer": held}),
        prompt("code", row={"ground_truth": json.dumps([LINES])}),
    ):
        assert verifiers.verify(asked, TWICE).label is Label.CORRECT
        assert verifiers.verify(asked, "print(9)").label is Label.WRONG


UNITS = {
    "raises": ("import pytest\ndef test_a():\n    with pytest.raises(TypeError, match='upported'):\n        add(1, 'a')\n", ADD, "def add(a, b): return 3"),
    "raises by call": ("import pytest\ndef test_a():\n    pytest.raises(TypeError, add, 1, 'a')\n", ADD, "def add(a, b): return 3"),
    "approx": ("import pytest\ndef test_a():\n    assert add(0.1, 0.2) == pytest.approx(0.3)\n    assert [add(0.1, 0.2)] == pytest.approx([0.3])\n", ADD, "def add(a, b): return 0.3001"),
    "parametrize": ("import pytest\n@pytest.mark.parametrize('a, b, c', [(1, 2, 3), pytest.param(2, 2, 4, id='x')])\n@pytest.mark.slow\ndef test_a(a, b, c):\n    assert add(a, b) == c\n", ADD, "def add(a, b): return 3"),
    "fixture": ("import pytest\n@pytest.fixture\ndef one():\n    yield 1\n@pytest.fixture()\ndef two(one):\n    return one + 1\ndef test_a(one, two):\n    assert add(one, two) == 3\n", ADD, "def add(a, b): return 4"),
    "class": ("class TestAdd:\n    def setup_method(self):\n        self.one = 1\n    def test_a(self):\n        assert add(self.one, 2) == 3\n", ADD, "def add(a, b): return 4"),
    "module": ("import solution\ndef test_a():\n    assert solution.add(1, 2) == 3\n", ADD, "def add(a, b): return 4"),
    "alias": ("from main import add as plus\ndef test_a():\n    assert plus(1, 2) == 3\n", ADD, "def add(a, b): return 4"),
    "star": ("from solution import *\ndef test_a():\n    assert add(1, 2) == 3\n", ADD, "def add(a, b): return 4"),
    "assertRaises": ("import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        with self.assertRaises(TypeError):\n            add(1, 'a')\n    def test_b(self):\n        for n in range(3):\n            with self.subTest(n=n):\n                self.assertEqual(add(n, n), 2 * n)\n", ADD, "def add(a, b): return 3"),
    "helper": ("def same(a, b):\n    assert a == b\ndef test_a():\n    same(add(1, 2), 3)\n", ADD, "def add(a, b): return 4"),
    "plain": ("from solution import add\nassert add(1, 2) == 3\n", ADD, "def add(a, b): return 4"),
    "any exception": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        with self.assertRaises(Exception):\n            add(1, 'a')\n",
        ADD,
        "def add(a, b): return 3",
    ),
    "loses the program": ("import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertRaises(BaseException, add, 1, 'a')\n", ADD, "import os\ndef add(a, b): os._exit(0)"),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("reference", ["", ADD])
def test_functions_and_classes_are_run(verifiers: Verifiers, name: str, reference: str) -> None:
    test, right, wrong = UNITS[name]
    asked = prompt("code", row={"test": test, "reference_solution": reference})
    assert not verifiers.check_references([asked]).bad
    assert verifiers.verify(asked, right).label is Label.CORRECT, verifiers.verify(asked, right)
    for text in (wrong, PRINTS_3, "", "def other(): pass"):
        assert verifiers.verify(asked, text).score < 1.0, text


@needs_sandbox
def test_each_function_is_a_test(verifiers: Verifiers) -> None:
    verdict = verifiers.verify(prompt("code", row={"test": PYTEST}), "def add(a, b): return 3")
    assert (verdict.label, verdict.score) == (Label.PARTIAL, 0.5)


RUNS = "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(add(1, 2), 3)\n"


@needs_sandbox
def test_tests_that_run_themselves_are_left_to_do_so(verifiers: Verifiers) -> None:
    """By a call, or with an assert of the outcome; a runner whose outcome nobody looks at would let everything pass."""
    sources = [
        "def test_a():\n    assert add(1, 2) == 3\ntest_a()\n",
        f"{RUNS}r = unittest.TestResult()\nT('test_a').run(r)\nassert r.wasSuccessful()\n",
    ]
    for source in sources:
        asked = prompt("code", row={"test": source})
        assert verifiers.verify(asked, ADD).label is Label.CORRECT
        for program in ("def add(a, b): return 4", PRINTS_3, "import os\ndef add(a, b): os._exit(0)"):
            assert verifiers.verify(asked, program).label is Label.WRONG
    asked = prompt("code", row={"test": f"{RUNS}unittest.TextTestRunner().run(T('test_a'))\n"})
    assert verifiers.verify(asked, "def add(a, b): return 4").label is Label.UNKNOWN


UNUSABLE = {
    "no asserts": ({"tests": ["print(add(1, 2))"]}, "assert something"),
    "a function without asserts": ({"test": "def test_a():\n    add(1, 2)\n"}, "asserts"),
    "check without a name": ({"test": "def check(candidate):\n    assert candidate(1) == 2\n"}, "entry_point"),
    "a call without a name": ({"tests": [{"type": "function_call", "input": [1, 2], "output": [3]}]}, "name of a function"),
    "two functions": ({"tests": [CALL, {**CALL, "fn_name": "sub"}]}, "one function"),
    "calls and runs": ({"tests": [CALL, LINES]}, "one kind"),
    "another kind of case": ({"tests": [{**CALL, "type": "interactive"}]}, "type of a case"),
    "named arguments": ({"tests": [{**CALL, "input": {"a": 1, "b": 2}}]}, "as a list"),
    "another language": ({"verification_info": json.dumps({"language": "rust", "test_cases": [LINES]})}, "rust"),
    "no cases": ({"verification_info": json.dumps({"language": "python"})}, "test_cases"),
    "asserts and cases": ({"tests": ["assert add(1, 2) == 3", CALL]}, "one form"),
    "another package": ({"tests": ["import torch\nassert torch.equal(add(1, 2), 3)"]}, "the tests import torch"),
    "mock": ({"test": "from unittest.mock import patch\ndef test_a():\n    assert add(1, 2) == 3\n"}, "unittest.mock"),
    "capsys": ({"test": "def test_a(capsys):\n    add(1, 2)\n    assert capsys.readouterr().out\n"}, "capsys"),
    "skip": ({"test": "import pytest\n@pytest.mark.skip\ndef test_a():\n    assert add(1, 2) == 3\n"}, "skip"),
    "printed": ({"test": "import sys, io\ndef test_a():\n    sys.stdout = io.StringIO()\n    add(1, 2)\n    assert sys.stdout.getvalue()\n"}, "sys.stdout"),
    "coroutine": ({"test": "async def test_a():\n    assert add(1, 2) == 3\n"}, "coroutine"),
    "unknown columns": ({"problem": "Add.", "checker": "x"}, "got a row with"),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", UNUSABLE)
def test_a_task_that_cannot_be_run_is_unusable_and_no_program_is_wrong(verifiers: Verifiers, name: str) -> None:
    row, reason = UNUSABLE[name]
    asked = prompt("code", row=row)
    (bad,) = verifiers.check_references([prompt("code", row={"tests": ["assert f() == 1"]}), asked]).bad
    assert bad.row == 1
    assert reason in bad.reason
    for program in (ADD, PRINTS_3):
        verdict = verifiers.verify(asked, program)
        assert verdict.label is Label.UNKNOWN, verdict
        assert reason in verdict.reason


def test_where_cases_are_printed_the_rows_function_is_not_called() -> None:
    """A case's own word counts first; `stdin` says it, too."""
    assert task_of({"entry_point": "add", "tests": [{"stdin": "4", "stdout": "8"}]}).stdio == (("4", "8"),)
    assert task_of({"entry_point": "add", "tests": [LINES]}).stdio == (("4\n", "8\n"),)
    assert task_of({"entry_point": "add", "tests": [{"input": [1, 2], "output": 3}]}).functions == (((1, 2), 3),)
    assert len(read({"examples": [{"input": "1", "output": "2"}], "official_tests": []})) == 1
