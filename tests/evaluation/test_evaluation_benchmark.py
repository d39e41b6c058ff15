"""Benchmarks as data: each shipped file, its rows from the published files and by the hub's columns, and mistakes."""

import json

import pytest
import yaml
from real_files import FILES, REPOSITORY, real, write
from toys import write_jsonl
from transformers import AutoTokenizer

from prime_lightning.evaluation.benchmark import benchmark_names, load_benchmark
from prime_lightning.evaluation.metrics import load_metric
from prime_lightning.evaluation.runner import graded
from prime_lightning.prompts.dataset import CODE_USER, Template
from prime_lightning.verifiers import Verifiers

NAMES = [
    "aime2024", "aime2025", "amc2023", "arithmetic", "gsm8k", "humaneval", "math500", "mbpp", "mbpp_sanitized",
    "minerva_math", "olympiadbench", "svamp",
]  # fmt: skip
SAMPLED = {"aime2024", "aime2025", "amc2023"}


def test_all_benchmarks_are_shipped():
    assert benchmark_names() == NAMES
    wheel = (REPOSITORY / "pyproject.toml").read_text()
    assert '"evals" = "prime_lightning/evals"' in wheel


@pytest.mark.parametrize("name", NAMES)
def test_every_file_says_all_there_is_to_say(name):
    benchmark = load_benchmark(name)
    assert benchmark.title
    assert benchmark.licence
    assert {"prime", "chat"} <= {t for t in ("prime", "chat") if benchmark.template(t)}
    assert [load_metric(metric).about for metric in benchmark.metrics]
    s = benchmark.sampling
    expected = (16, 0.3, 0.95) if name in SAMPLED else (1, 1.0 if name == "arithmetic" else 0.0, 1.0)
    assert (s.samples, s.temperature, s.top_p) == expected
    pinned = benchmark.prompts["init_args"].get("revision")
    text = (REPOSITORY / "evals" / "benchmarks" / f"{name}.yaml").read_text()
    assert pinned is None or len(pinned) == 40
    assert pinned or name == "arithmetic" or "No revision is pinned" in text
    if name not in {"arithmetic", "humaneval", "mbpp", "mbpp_sanitized"}:
        assert benchmark.metrics == ["math_accuracy", "pass_at_k", "majority_vote"]
        assert [benchmark.place(template) for template in ("prime", "chat", "base")] == ["boxed", "boxed", "final"]
        assert "final answer is" in benchmark.template("base").user
        assert not benchmark.template("base").chat


@pytest.mark.parametrize("name", FILES)
def test_published_files_have_the_rows_and_fill_the_templates(name):
    benchmark = load_benchmark(name)
    prompts = benchmark.load(data=real(name))
    assert benchmark.size(prompts, None) in (benchmark.rows if isinstance(benchmark.rows, list) else [benchmark.rows])
    for template in ("prime", "chat"):
        messages = benchmark.template(template).messages(prompts.row(len(prompts) - 1))
        assert len(messages) == (2 if template == "prime" else 1)
        assert "{" + "problem}" not in messages[-1]["content"]
    if prompts.kind == "code":
        assert "```python" in messages[-1]["content"]
    else:
        assert "\\boxed{" in messages[-1]["content"]
        assert all(prompts.answer_of(prompts.row(i)).strip() for i in range(len(prompts)))


HUB = {
    "svamp": ({"id": "chal-1", "question": "1+1?", "chain": "", "result": "2", "result_float": 2.0}, "2"),
    "gsm8k": ({"question": "1+1?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}, "2"),
    "minerva_math": ({"question": "1+1?", "answer": "2"}, "2"),
    "olympiadbench": ({"question": "Solve.", "final_answer": ["$2$", "$3$"], "unit": None}, "2, 3"),
    "amc2023": ({"id": 0, "problem": "1+1?", "answer": "142.0", "url": ""}, "142"),
    "math500": ({"problem": "1+1?", "solution": "", "answer": "2", "unique_id": "test/1.json"}, "2"),
    "mbpp": (
        {"task_id": 11, "text": "Add.", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"],
         "test_setup_code": "", "challenge_test_list": []},
        "",
    ),
    "mbpp_sanitized": (
        {"task_id": 11, "prompt": "Add.", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"],
         "test_imports": []},
        "",
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "import math\n\ndef f(x):\n    '''Same.'''\n", "entry_point": "f",
         "canonical_solution": "    return x\n", "test": "def check(candidate):\n    assert candidate(1) == 1\n"},
        "",
    ),
}  # fmt: skip


def own(tmp_path, name, rows, **changes):
    """A benchmark file of one's own, like a shipped one, that takes as many rows as are given."""
    spec = yaml.safe_load((REPOSITORY / "evals" / "benchmarks" / f"{name}.yaml").read_text()) | {"rows": len(rows)}
    spec["prompts"]["init_args"] |= {"path": write(tmp_path / "rows.jsonl", rows), "name": None, "revision": None}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec | changes))
    return str(path)


@pytest.mark.parametrize("name", HUB)
def test_columns_of_the_hub_are_read(name, tmp_path):
    row, answer = HUB[name]
    prompts = load_benchmark(own(tmp_path, name, [row])).load()
    asked = prompts.question(0, prompts.row(0))
    assert asked.answer == answer
    assert prompts.template.messages(asked.row)
    if prompts.kind == "code":
        assert asked.row.get("tests") or asked.row["test"]
    if name == "humaneval":
        assert asked.row["prelude"] == row["prompt"]  # its imports stand before the program
    if name.startswith("mbpp"):
        assert asked.row["reference_solution"] == row["code"]


def test_programs_have_the_imports_of_their_prompt(tmp_path):
    prompts = load_benchmark(own(tmp_path, "humaneval", [HUB["humaneval"][0]])).load()
    program = "```python\ndef f(x):\n    return math.floor(x)\n```"
    with Verifiers() as verifiers:
        [[row]] = graded(prompts, verifiers, {0: [{"completion": program}]})
    assert (row["id"], row["score"]) == ("HumanEval/0", 1.0)


ROW = {"problem": "1+1?", "answer": "2"}


def test_a_wrong_row_count_names_both(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROW] * 3)
    with pytest.raises(ValueError, match=r"Expected 500 rows of MATH-500 in '.*rows.jsonl', got 3"):
        load_benchmark("math500").load(data=path)
    with pytest.raises(ValueError, match="Expected 674 or 675 rows of OlympiadBench"):
        load_benchmark("olympiadbench").load(data=path)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("math500", {"problem": "1+1?"}, r"Expected the columns \['answer'\] in .*got \['problem'\]"),
        ("gsm8k", {"answer": "2"}, r"\['problem'\] in .* \(or, on the hub, \{'problem': 'question'\}\)"),
        ("mbpp", {"prompt": "Add."}, r"Expected the columns \['tests or test'\]"),
        ("math500", {**ROW, "answer": " "}, "Expected `answer` in every row"),
    ],
)
def test_missing_columns_are_named(name, row, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_benchmark(name).load(data=write(tmp_path / "rows.jsonl", [row]))


def test_extra_columns_stay_and_do_no_harm(tmp_path):
    rows = [{**ROW, "colour": "red", "nested": {"a": [1]}}]
    assert load_benchmark(own(tmp_path, "math500", rows)).load().row(0)["colour"] == "red"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"Expected a benchmark of \['aime2024', .* or a YAML file, got 'math50'"),
        ("rows: [", "Expected a benchmark in"),
        ("- 1", "Expected a benchmark in"),
        ("title: T", "Expected a benchmark in"),
        ("{title: T, licence: L, rows: 1, prompts: {class_path: os.path}, templates: maths, colour: red}", "colour"),
    ],
)
def test_what_is_no_benchmark_is_refused(text, words, tmp_path):
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_benchmark("math50" if text is None else str(path))


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"Expected the import path of a subclass of Prompts, got 'os\.path'"):
        load_benchmark(own(tmp_path, "math500", [ROW], prompts={"class_path": "os.path"})).load()
    with pytest.raises(ValueError, match="Expected a group of templates"):
        load_benchmark(own(tmp_path, "math500", [ROW], templates="poems")).load()
    with pytest.raises(
        ValueError, match=r"Expected a template of \['base', 'chat', 'prime'\] for the benchmark 'math500'"
    ):
        load_benchmark("math500").load(template="poem")
    with pytest.raises(ValueError, match="Expected no data file for 'arithmetic'"):
        load_benchmark("arithmetic").load(data="x.jsonl")
    with pytest.raises(ValueError, match="which does not exist"):
        load_benchmark("math500").load(data="nowhere.jsonl")


CODE = "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
"""Of the model card of PRIME-RL/Eurus-2-7B-SFT, white space and all."""


def test_own_templates_and_the_system_prompt_of_the_authors(tmp_path):
    path = own(tmp_path, "math500", [ROW], templates={"plain": {"user": "Q: {problem}", "chat": False}})
    assert load_benchmark(path).load(template="plain").template.messages(ROW)[0]["content"] == "Q: 1+1?"
    system, user = load_benchmark("aime2024").template("prime").messages(ROW)
    actions = "\n\n[ASSESS]\n\n[ADVANCE]\n\n[VERIFY]\n\n[SIMPLIFY]\n\n[SYNTHESIZE]\n\n[PIVOT]\n\n[OUTPUT]\n\n"
    assert f"progress through your thought process.{actions}You should strictly follow" in system["content"]
    assert system["content"].startswith("\nWhen tackling complex reasoning tasks, you have access")
    assert system["content"].endswith("# Your action step 3\n\n...\n\nNext action: [NEXT ACTION NAME]\n\n")
    assert user["content"] == "1+1?\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
    assert json.dumps(system) == json.dumps(
        load_benchmark("mbpp").template("prime").messages({"prompt": "", "tests": [""]})[0]
    )
    [_, code] = load_benchmark("humaneval").template("prime").messages({"prompt": "def f():"})
    assert code["content"] == f"def f():{CODE}"
    assert Template(user=CODE_USER).messages({"prompt": "Add."}) == [{"role": "user", "content": f"Add.{CODE}"}]


def test_the_prompts_of_mbpp_are_those_of_the_authors_file():
    """Their `new_mbpp.json` has the task and its first assert as `instruction`."""
    template = load_benchmark("mbpp_sanitized").template("prime")
    with open(real("prime_new_mbpp.jsonl"), encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 399
    assert [template.messages(row)[1]["content"] for row in rows] == [row["instruction"] + CODE for row in rows]


def test_variables_of_the_chat_template_reach_it(tmp_path, chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<|no|>{% endif %}"
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "How many hens?", "answer": "2"}])
    init = {"path": path, "kind": "math"}
    rows = {"class_path": "prime_lightning.prompts.BenchmarkRows", "init_args": init}
    thinking = {"user": "{problem}", "chat_template_kwargs": {"enable_thinking": True}}
    (tmp_path / "own.yaml").write_text(
        json.dumps({"title": "Own", "licence": "own", "rows": 1, "prompts": rows, "templates": {"prime": thinking}})
    )
    benchmark = load_benchmark(str(tmp_path / "own.yaml"))
    texts = [
        benchmark.load(chat_template_kwargs=variables).prompt(0, tokenizer).text
        for variables in (None, {"enable_thinking": False})
    ]
    assert [text.endswith("<|no|>") for text in texts] == [False, True]
    assert benchmark.load(chat=False).prompt(0, tokenizer).text == "How many hens?"
    with pytest.raises(ValueError, match="no `chat_template_kwargs` without the chat template"):
        benchmark.load(chat=False, chat_template_kwargs={"enable_thinking": False})
