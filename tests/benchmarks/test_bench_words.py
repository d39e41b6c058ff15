"""The benchmark on word problems: lessons from equations, its stages in their smallest form, and whom it blames."""

import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
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
import word_problems_summary

from prime_lightning.__main__ import main
from prime_lightning.cli.lightning_cli import lightning
from prime_lightning.prm.implicit import Scored
from prime_lightning.report.runs import read_metrics

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
    cpu |= {"lessons": [{"rows": [0, 3], "drills": 1, "batch_size": 2}, {"rows": [3, 8], "drills": 0, "batch_size": 4}]}
    cpu |= {"held_out": 4, "save_every": 1}
    cpu["rl"]["trainer"]["max_steps"] = 2
    for lora in ("policy_lora", "prm_lora"):
        cpu["rl"]["model"][lora]["target_modules"] = r".*\.layers\.1\..*_proj"  # its upper half
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
    assert [one["stage"] for one in stages] == ["warm", "warm", "rl", "rl", *["eval"] * 4, "credit"]
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 12  # of one step
    assert [one["lessons"] for one in stages[:2]] == [4, 5]
    for run in stages[2:4]:
        assert run["curve"]["rollout/responses"] == [8.0, 8.0]  # equal cost
        assert bool(run["curve"]["prm/ce"]) == (run["method"] == "prime")
    assert {one["model"] for one in stages[4:8]} == {"untrained", "warm", "rloo-seed0", "prime-seed0"}
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
    curves = [noted(out)[2]["curve"] for out in outs]
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
    (lesson,) = teach.lessons(
        [
            {
                "problem": "Of 25000 he spends 1500 in each of 8.",
                "answer": "13000",
                "equation": "- number0 * number1 number2",
            }
        ]
    )
    assert lesson["response"].splitlines() == [
        "Multiply: 1500 * 8 = 12000",
        "Subtract: 25000 - 12000 = 13000",
        r"\boxed{13000}",
    ]


@given(st.integers(0, 1000))
@settings(deadline=None)
def test_a_drill_asks_for_sums_that_children_do_and_does_them(seed):
    (lesson,) = teach.drills(1, sums=9, seed=seed)
    *lines, box = lesson["response"].splitlines()
    asked = lesson["problem"].split(", ")
    assert len(lines) == len(asked) == 9
    for task, line in zip(asked, lines, strict=True):
        left, sign, right, result = re.fullmatch(r"\w+: (\d+) ([-+*/]) (\d+) = (\d+)", line).groups()
        assert task == f"{left} {sign} {right}"
        assert line.split(":")[0] == teach.SAID[sign]
        a, b, c = int(left), int(right), int(result)
        assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": c * b == a}[sign]
        assert max(a, b) <= (1188 if sign == "/" else 999)
    assert box == rf"\boxed{{{lesson['answer']}}}"
    assert lines[-1].endswith(f"= {lesson['answer']}")
    assert next(teach.drills(2, sums=9, seed=seed)) == lesson


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


@given(EQUATIONS, st.lists(st.integers(1, 99), min_size=3, max_size=3))
def test_the_steps_lead_to_the_equations_value(equation, values):
    text = "There are {} hens, {} eggs and {} men.".format(*values)
    try:
        expected, _ = slow(equation.split(), [Fraction(v) for v in values])
    except ZeroDivisionError:
        return
    steps = teach.solution(text, equation)
    assert steps[-1].result == expected
    assert len(steps) == sum(equation.count(sign) for sign in "+-*/")


@given(EQUATIONS, st.lists(st.integers(1, 99), min_size=3, max_size=3), st.integers(1, 9))
@settings(deadline=None)
def test_an_answer_that_only_computes_wrongly_is_set_up_right(equation, values, off):
    """Each result is replaced by a wrong one, there and where it is taken up."""
    text = "There are {} hens, {} eggs and {} men.".format(*values)
    try:
        steps = teach.solution(text, equation)
    except ZeroDivisionError:
        return
    lines, wrong = [], {}
    for i, step in enumerate(steps):
        left, right = (wrong.get(side, side) for side in (step.left, step.right))
        wrong[step.result] = Fraction(100_000 * (i + 1) + off)
        lines.append(f"{teach.SAID[step.operation]}: {left} {step.operation} {right} = {wrong[step.result]}")
    if all(step.left.denominator == step.right.denominator == 1 and step.result not in values for step in steps):
        found = teach.set_up("\n".join([*lines, rf"\boxed{{{wrong[steps[-1].result]}}}"]))
        assert found == steps[-1].result
    assert teach.set_up("It is 12.\n\\boxed{12}") is None
    assert teach.set_up("Divide: 3 / 0 = 3\n\\boxed{3}") is None
    assert teach.set_up("\\boxed{3}") is None


@pytest.mark.parametrize(
    "equation", ["+ number0", "number0 number1", "number0", "+ number0 number9", "+ number0 x", ""]
)
def test_an_equation_that_is_none_gives_no_lesson(equation):
    row = {"problem": "2 and 3", "answer": "5", "equation": equation}
    with pytest.raises(ValueError, match="Expected"):
        teach.solution(row["problem"], equation)
    assert list(teach.lessons([row])) == []


def test_rl_gets_as_many_problems_of_each_operation_and_those_that_mislead_first():
    rows = [
        {"problem": f"{i + 2} and {j}{more}", "answer": str(answer), "equation": equation}
        for i in range(6)
        for j, more, equation, answer in (
            (1, "", "+ number0 number1", i + 3),
            (1, " and 4", "+ - number0 number1 number2", i - 1),  # two steps
            *([(3, " and 4", "* number0 number2", 4 * (i + 2))] if i % 2 else []),
            (5, " and 7" if i == 4 else "", "- number1 number0", 3 - i),
            (6, "", "- number1 number0", 0),  # leads elsewhere but for i = 4
        )
    ]
    chosen = teach.one_step(rows)
    assert sorted(row["equation"][0] for row in chosen) == ["*"] * 3 + ["+"] * 3 + ["-"] * 3
    assert all(len(teach.checked(row)) == 1 for row in chosen)
    misleading = [len(teach.numbers(row["problem"])) > 2 for row in chosen]
    assert misleading == [True] * 4 + [False] * 5
    for part in (chosen[:4], chosen[4:]):
        assert [rows.index(row) for row in part] == sorted(rows.index(row) for row in part)
    assert [row["answer"] for row in chosen[4:] if row["equation"][0] == "+"] == ["3", "4", "5"]
    assert teach.one_step([]) == []


def test_a_row_whose_equation_leads_elsewhere_gives_no_lesson():
    assert list(teach.lessons([{"problem": "40 by 7", "answer": "5", "equation": "/ number0 number1"}])) == []


@given(st.integers(0, 19), st.integers(0, 2), st.integers(1, 50))
def test_the_first_wrong_number_is_blamed_and_what_follows_is_left_out(which, place, off):
    row = list(problems(20))[which]
    steps = teach.checked(row)
    lines = teach.worked(steps).splitlines()
    assert blame.line_truths(lines, row) == (True, [True] * 3)
    known = [str(step.result) for step in steps] + [row["answer"]]
    wrong = next(str(n) for n in range(1000 + off, 2000) if str(n) not in known)
    broken = [*lines[:place], f"so = {wrong}.", *lines[place + 1 : 2], rf"The answer is \boxed{{{wrong}}}."][:3]
    assert blame.line_truths(broken, row) == (False, [True] * place + [False])
    words = " ".join(broken).split()
    assert blame.word_truths(words, row) == [True] * next(i for i, word in enumerate(words) if wrong in word) + [False]


def test_rewards_of_words_are_the_sums_of_their_tokens():
    tokens, rewards = ["It", " is", " 1", "2", ".", " So", "<end>"], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    one = Scored(tokens=tokens, token_rewards=rewards, steps=[], step_rewards=[], step_tokens=[], reward=127.0)
    row = {"problem": "2 and 3", "answer": "5", "equation": "+ number0 number1"}
    parts = blame.judged_words("It is 12. So", one, row)
    assert parts.truths == [True, True, False]
    assert parts.rewards == [1, 2, 4 + 8 + 16, 32 + 64]


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
        (["credit", "--seed", "3"], "{}", "rl --method prime --seed 3"),
    ],
)
def test_what_is_missing_is_said_in_a_line(stage, train, said, tmp_path):
    (tmp_path / "train.jsonl").write_text(train + "\n")
    words = ["--train", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as error:
        word_problems.main([*stage, *words])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_evaluation_without_a_set_up_share_leaves_its_cell_empty():
    result = {"title": "GSM8K", "problems": 5, "metrics": {"accuracy": 0.1}, "interval": {"accuracy": [0, 1]}}
    table = word_problems_summary.summary([{"stage": "eval", "model": "untrained", "result": result}])
    assert table.endswith("| 5 |  |  |")


def test_the_last_of_a_stage_counts_and_gains_are_points_above_the_warm_start():
    def evaluated(model, accuracy):
        result = {"title": "SVAMP", "problems": 10, "metrics": {"accuracy": accuracy}, "interval": {"accuracy": [0, 1]}}
        return {"stage": "eval", "model": model, "result": result, "set_up": 0.5}

    table = word_problems_summary.summary(
        [evaluated("warm", 0.9), evaluated("warm", 0.2), evaluated("prime-seed0", 0.3)]
    )
    assert table.count("| warm |") == 1
    assert "| prime-seed0 | 30.0% | 0.0% to 100.0% | 10 | +10.0 | 50.0% |" in table
