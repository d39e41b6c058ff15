"""`prime-lightning evaluate`: sampled and given completions, resume, and whose results a folder holds."""

import json
import re
import shutil
from pathlib import Path

import pytest
from real_files import FILES, real, script, write
from test_evaluation_benchmark import own
from transformers import AutoModelForCausalLM

from prime_lightning.__main__ import main
from prime_lightning.evaluation.folder import ResultsFolder, fingerprint
from prime_lightning.training.callbacks import heartbeat

MATHS = [{"id": f"q{i}", "problem": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]


def evaluate(*args):
    return main(["evaluate", *map(str, args)])


def read(folder, name="arithmetic.jsonl"):
    return [json.loads(line) for line in (folder / name).open()]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def stable(folder):
    return {name: {**row, "seconds": 0} for name, row in results(folder)["benchmarks"].items()}


def test_a_model_is_evaluated_and_a_stopped_run_goes_on(warm_model, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    args = ("--model", warm_model, "--benchmark", "arithmetic", "--limit", 6, "--samples", 2, "--engine.batch_size", 4)
    assert evaluate(*args, "--out", out) == 0
    said = capsys.readouterr()
    assert "| Chained arithmetic modulo 10 | 6 x 2 | avg2 |" in said.out
    assert "\r" not in said.err  # no bar where there is no terminal
    rows = read(out)
    assert [(r["draw"], r["sample"]) for r in rows] == [(p, k) for p in range(6) for k in range(2)]
    found = results(out)["benchmarks"]["arithmetic"]
    assert found["metrics"]["avg2"] == pytest.approx(sum(r["score"] for r in rows) / 12)
    assert found["sampling"]["max_tokens"] == 24
    assert (out / "results.md").read_text() in said.out

    shutil.copytree(out, again)
    lines = (out / "arithmetic.jsonl").read_text().splitlines(keepends=True)
    (again / "arithmetic.jsonl").write_text("".join(lines[:5]) + lines[5][:40])  # killed while it wrote
    (again / "results.json").unlink()
    assert evaluate(*args, "--out", again) == 0
    assert sorted(map(str, read(again))) == sorted(map(str, rows))
    assert stable(again) == stable(out)
    before = (out / "arithmetic.jsonl").stat().st_mtime_ns, stable(out)
    assert evaluate(*args, "--out", out) == 0  # nothing is missing: nothing is sampled
    assert stable(out) == before[1]


def test_long_work_says_what_it_will_do_and_where_it_is(warm_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heartbeat, "SECONDS", 0.02)
    args = ("--model", warm_model, "--benchmark", "arithmetic", "--limit", 40, "--engine.batch_size", 4)
    assert evaluate(*args, "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    title = "Chained arithmetic modulo 10"
    begins, hint = said.err.splitlines()[:2]
    assert begins == f"{title}: 40 problems, 1 answer each of at most 24 tokens, by HFEngine"
    assert "vllm.VLLMEngine" in hint
    beats = [line for line in said.out.splitlines() if line.startswith(f"{title}: ")]
    assert beats
    done = [int(re.fullmatch(r".*: (\d+) of 40 problems, \d+ s gone(, about \d+ s left)?", line)[1]) for line in beats]
    assert done == sorted(done)
    assert all(("left" in line) == (count > 0) for line, count in zip(beats, done, strict=True))


def test_a_call_that_could_not_begin_does_not_claim_the_folder(warm_model, tmp_path, capsys):
    out = tmp_path / "out"
    args = ("--benchmark", "arithmetic", "--limit", 2, "--out", out)
    assert evaluate("--model", tmp_path / "misspelt", *args) == 2  # no such model
    assert evaluate("--model", warm_model, *args, "--max_tokens", 4096) == 2  # more than it has positions
    assert not out.exists()
    assert evaluate("--model", warm_model, *args) == 0
    assert f"Everything: {out}" in capsys.readouterr().out


def test_one_call_at_a_time_writes_to_a_folder(warm_model, tmp_path, capsys):
    out = tmp_path / "out"
    args = ("--model", warm_model, "--benchmark", "arithmetic", "--limit", 2, "--out", out)
    late = ResultsFolder(str(out), str(warm_model), fingerprint(str(warm_model)))  # begins before there is anything
    late.begin("arithmetic", {}, 1)
    assert evaluate(*args) == 0
    before = (out / "arithmetic.jsonl").read_text()
    with pytest.raises(ValueError, match="got results meanwhile"):
        late.add("arithmetic", [])
    assert (out / "arithmetic.jsonl").read_text() == before
    capsys.readouterr()
    assert evaluate(*args) == 2  # the other one is still there
    assert f"got {str(out)!r}, where another `evaluate` is at work. Wait for it" in capsys.readouterr().err
    late.close()
    assert evaluate(*args) == 0


def test_models_that_differ_in_one_matrix_are_told_apart(chat_model, tmp_path):
    """As two merges of adapters do, whose files are of one size and equal at both ends."""
    kept = fingerprint(str(shutil.copytree(chat_model, tmp_path / "model")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.model.layers[1].self_attn.q_proj.weight.data += 0.01
    model.save_pretrained(tmp_path / "model")
    assert fingerprint(str(tmp_path / "model")) != kept
    big = tmp_path / "big"
    big.mkdir()
    (big / "model.safetensors").write_bytes(bytes(1 << 25))
    kept = fingerprint(str(big))
    with (big / "model.safetensors").open("r+b") as file:
        file.seek(1 << 24)
        file.write(b"1" * (1 << 15))  # a thousandth, in the middle
    assert fingerprint(str(big)) != kept


def test_a_benchmark_of_other_rows_is_refused(tmp_path, capsys):
    spec = own(tmp_path, "math500", MATHS)
    path = write(tmp_path / "given.jsonl", [{"problem": i, "completion": "\\boxed{1}"} for i in range(4)])
    args = ("--model", "m", "--benchmark", spec, "--completions", path, "--out", tmp_path / "out")
    assert evaluate(*args) == 0
    write(tmp_path / "rows.jsonl", [{**row, "answer": "1"} for row in MATHS])
    assert evaluate(*args) == 2
    assert re.search(r"got others: data '\w+' there and '\w+' here", capsys.readouterr().err)


def test_a_folder_of_other_results_is_refused(warm_model, model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    args = ("--benchmark", "arithmetic", "--out", out, "--limit")
    assert evaluate("--model", warm_model, *args, 2) == 0
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    for more, words in (
        (("--model", model_folder, *args, 2), "which holds results of"),
        (("--model", warm_model, *args, 3), "limit 2 there and 3 here"),
        (("--model", warm_model, *args, 2, "--temperature", 0.5), "sampling.temperature 1.0 there and 0.5 here"),
    ):
        assert evaluate(*more) == 2
        assert words in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert evaluate("--model", warm_model, "--benchmark", "arithmetic", "--out", other) == 2
    assert "Expected a new, an empty or a results folder" in capsys.readouterr().err
    assert evaluate("--model", warm_model, "--benchmark", "arithmetic", "--out", other / "thesis.txt") == 2
    assert "got the file" in capsys.readouterr().err


def test_given_completions_are_graded(tmp_path, capsys):
    spec = own(tmp_path, "math500", MATHS)
    given = [{"id": r["id"], "completion": f"\\boxed{{{r['answer']}}}"} for r in MATHS]
    given += [{"draw": i, "completion": "", "length": 1, "finish": "stop"} for i in range(4)]
    path = write(tmp_path / "given.jsonl", given)
    out = tmp_path / "out"
    assert evaluate("--model", "someone's", "--benchmark", spec, "--completions", path, "--out", out) == 0
    assert results(out)["benchmarks"]["math500"]["metrics"]["avg2"] == 0.5
    assert [r["completion"] for r in read(out, "math500.jsonl")[:2]] == ["\\boxed{1}", ""]
    said = capsys.readouterr().out
    assert "| MATH-500 | 4 x 2 | avg2 | 50.0 |" in said
    assert "nan" not in said
    limited = ("--limit", 2, "--out", tmp_path / "two")  # of a file with all
    assert evaluate("--model", "someone's", "--benchmark", spec, "--completions", path, *limited) == 0
    assert [r["draw"] for r in read(tmp_path / "two", "math500.jsonl")] == [0, 0, 1, 1]


def test_where_answers_stand_is_said_by_the_template_or_the_command_line(tmp_path, capsys):
    spec = own(tmp_path, "math500", MATHS)
    stated = [{"id": r["id"], "completion": f"The answer is {r['answer']}."} for r in MATHS]
    path = write(tmp_path / "given.jsonl", stated + [{**r, "completion": "So one has 9 left."} for r in stated] * 2)
    args = ("--model", "someone's", "--benchmark", spec, "--completions", path)
    found = {}
    for name, more in {
        "boxed": (),
        "final": ("--math.answer", "final"),
        "base": ("--template", "base"),
        "base, boxed": ("--template", "base", "--math.answer", "boxed"),
    }.items():
        assert evaluate(*args, *more, "--out", tmp_path / name) == 0
        found[name] = results(tmp_path / name)["benchmarks"]["math500"]
    assert {name: found[name]["metrics"]["avg3"] for name in found} == pytest.approx(
        {"boxed": 0.0, "final": 1 / 3, "base": 1 / 3, "base, boxed": 0.0}
    )
    assert found["base"]["answer"] == "final"
    assert found["base"]["metrics"]["maj3"] == 1.0  # a sample that states nothing does not vote
    assert evaluate(*args, "--out", tmp_path / "final") == 2  # results of another place are others
    assert evaluate(*args, "--math.answer", "everywhere", "--out", tmp_path / "none") == 2
    assert "anywhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "got 0 to 0: none"),
        ([{"id": "q0", "completion": "1"}], "got 0 to 1; problems [1, 2, 3] ... have fewer"),
        ([{"id": "q9", "completion": "1"}], "Expected `id` or `draw` (0 to 3) of math500 in line 1 of"),
        ([{"completion": "1"}], "got the keys ['completion']"),
        ([{"id": "q0", "text": "1"}], "Expected exactly one of completion, response in line 1 of"),
        ([{"id": "q0", "completion": None}], "Expected text in `completion` of line 1 of"),
        ([{"problem": [0], "completion": ""}], "of math500 in line 1 of"),
        (
            [{"problem": 0, "completion": "", "tokens": "7"}],
            "Expected a number of tokens, a list of them, or null, in `tokens` of line 1 of",
        ),
        ([["q0", "1"]], "Expected a JSON object in line 1 of"),
        (['{"id": "q0", "compl'], "Expected a JSON object in line 1 of"),
        ([{"problem": i, "completion": ""} for i in range(4)], "got 4 empty completions"),
    ],
)
def test_completions_that_do_not_fit_are_refused(rows, words, tmp_path, capsys):
    spec, path = own(tmp_path, "math500", MATHS), write(tmp_path / "given.jsonl", rows)
    if rows and isinstance(rows[0], str):
        Path(path).write_text(rows[0])  # a line that was cut off
    assert evaluate("--model", "m", "--benchmark", spec, "--completions", path, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_model_that_gives_nothing_but_its_end_token(silent_model, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate("--model", silent_model, "--benchmark", "arithmetic", "--limit", 3, "--out", out) == 2
    assert "the model gives nothing but its end token" in capsys.readouterr().err
    assert not (out / "results.json").exists()
    assert [r["completion"] for r in read(out)] == [""] * 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--benchmark", "arithmetic", "--engine", "null"), "Expected an --engine to sample with"),
        (("--benchmark", "math501"), "Expected a benchmark of"),
        (("--benchmark", "gsm8k", "math500", "--data", "x.jsonl"), "Expected one benchmark with --data"),
        (("--benchmark", "gsm8k", "math500", "--completions", "x.jsonl"), "Expected one benchmark with --completions"),
        (("--benchmark", "arithmetic", "--completions", "x.jsonl"), "which does not exist"),
        (("--benchmark", "arithmetic", "--limit", "0"), "Expected a --limit of at least 1"),
        (("--benchmark", "arithmetic", "--samples", "0"), "Expected sampling `samples` at least 1"),
        (("--benchmark", "math500", "--data", "x.jsonl"), "which does not exist"),
        (("--benchmark", "arithmetic", "--limit", "1"), "Expected a folder or a Hugging Face id with a tokenizer"),
    ],
)
def test_mistakes_get_clear_words(args, words, tmp_path, capsys):
    assert evaluate("--model", "no/such-model", "--out", tmp_path / "out", *args) == 2
    said = capsys.readouterr().err
    assert words in said, said
    assert "Traceback" not in said


def test_an_engine_that_is_none_is_refused(warm_model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate("--model", warm_model, "--benchmark", "arithmetic", "--engine", "os.path.join")
    assert "engine" in capsys.readouterr().err


def test_rows_of_real_benchmarks_through_a_chat_model(chat_model, tmp_path, capsys):
    """Maths, maths by several samples, and programs; the model is random, and nothing on the way is a stub."""
    for name, metric in (("math500", "accuracy"), ("aime2024", "avg16"), ("humaneval", "pass1")):
        args = ("--model", chat_model, "--benchmark", name, "--data", real(name), "--out", tmp_path)
        how = ("--limit", 1, "--template", "chat", "--max_tokens", 12, "--temperature", 1.0)
        assert evaluate(*args, *how) == 0
        assert f"| {metric} | 0.0 |" in capsys.readouterr().out
    assert read(tmp_path, "math500.jsonl")[0]["prompt"].startswith("<|user|>Convert the point $(0,3)$")
    assert list(results(tmp_path)["benchmarks"]) == ["math500", "aime2024", "humaneval"]
    assert (tmp_path / "results.md").read_text().count("\n|") == 2 + 1 + 7 + 1


EVERY = {
    "minerva_math": 10,
    "mbpp": 50,
    "mbpp_sanitized": 50,
    "humaneval": 20,
}
HEDGED = {"test/number_theory/459.json", "aime/2024-I-2"}
"""Their worked solutions end with the answer in two forms, each in a box, which the grader takes for hedging."""


@pytest.mark.parametrize("name", FILES)
def test_reference_solutions_are_right_and_shuffled_ones_wrong(name):
    """On a part of the slow ones' rows; `benchmarks/references.py` does all, and says the same."""
    from prime_lightning.evaluation.benchmark import load_benchmark
    from prime_lightning.verifiers import Verifiers

    prompts = load_benchmark(name).load(data=real(name))
    draws = range(0, len(prompts), EVERY.get(name, 1))
    with Verifiers() as verifiers:
        own_ones = list(script().scores(prompts, verifiers, draws, 0))
        shuffled = list(script().scores(prompts, verifiers, draws, 1))
    assert {row["id"] for row in own_ones if row["score"] != 1.0} <= HEDGED
    assert sum(row["score"] == 1.0 for row in shuffled) <= max(1, 0.06 * len(draws))
    assert all(row["verdict"] != "unknown" for row in own_ones + shuffled)
