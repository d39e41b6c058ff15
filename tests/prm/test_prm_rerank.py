"""Best-of-n of given and of fresh completions, against going through the written scores by hand."""

import itertools
import json
import re

import numpy as np
import pytest
from prm_rows import labelled_rows
from toys import write_jsonl

from prime_lightning.__main__ import main
from prime_lightning.cli.commands.rerank import compare, group, sizes, table
from prime_lightning.prompts.arithmetic import DIGITS, Chains
from prime_lightning.rollout import Rollout


def rerank(prm, out, *more):
    return main(["rerank", f"--prm.folder={prm}", f"--out={out}", "--kind=exact", *map(str, more)])


def results(out):
    return json.loads((out / "results.json").read_text())


def by_hand(out, rule, n):
    """Mean over problems and sets of n of the outcome of the best, from scored.jsonl."""
    problems = {}
    for line in (out / "scored.jsonl").read_text().splitlines():
        row = json.loads(line)
        problems.setdefault(row["prompt"], []).append((rule(row["step_rewards"]), row["score"]))
    values = []
    for rows in problems.values():
        picks = []
        for chosen in itertools.combinations(rows, n):
            top = max(score for score, _ in chosen)
            picks.append(np.mean([label for score, label in chosen if score == top]))
        values.append(np.mean(picks))
    return np.mean(values)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rerank") / "rows.jsonl"
    return write_jsonl(path, labelled_rows(60, 4, seed=8))


def test_given_completions(prm_run, rows, tmp_path, capsys):
    out = tmp_path / "out"
    assert rerank(prm_run / "prm", out, f"--input={rows}") == 0
    found = results(out)["methods"]
    assert [entry["n"] for entry in found["sum"]] == [1, 2, 4]
    for name, rule in (("sum", sum), ("mean", np.mean), ("min", min), ("last", lambda s: s[-1])):
        for entry in found[name]:
            assert entry["mean"] == pytest.approx(by_hand(out, rule, entry["n"]))
            assert entry["interval"][0] <= entry["mean"] <= entry["interval"][1]
    assert len({round(found[method][0]["mean"], 9) for method in found}) == 1  # of one sample, all pick that one
    for method, row in found.items():
        assert method == "pass" or all(e["mean"] <= p["mean"] + 1e-9 for e, p in zip(row, found["pass"], strict=True))
    assert found["sum"][-1]["mean"] > found["majority"][-1]["mean"]  # the PRM learned from this teacher
    gain = found["sum"][-1]["minus_majority"]
    assert gain["mean"] == pytest.approx(found["sum"][-1]["mean"] - found["majority"][-1]["mean"])
    said = capsys.readouterr().out
    assert (out / "table.md").read_text() in said
    assert "60 problems, 4 samples each" in said
    assert rerank(prm_run / "prm", out, f"--input={rows}") == 2
    assert "Expected a new or empty folder" in capsys.readouterr().err


def test_answers_are_graded_where_there_are_no_labels(prm_run, tmp_path):
    given = [
        {"prompt": f"^{a}+1=", "response": f"{r};#{r}", "answer": DIGITS[a + 1]} for a in range(4) for r in (1, 2, 2)
    ]
    out = tmp_path / "out"
    assert rerank(prm_run / "prm", out, f"--input={write_jsonl(tmp_path / 'rows.jsonl', given)}", "--n=[1, 3]") == 0
    found = results(out)["methods"]
    assert [entry["mean"] for entry in found["pass"]] == pytest.approx([(1 / 3 + 2 / 3) / 4, 2 / 4])
    assert [entry["mean"] for entry in found["majority"]] == pytest.approx([1 / 4, 1 / 4])


def test_empty_completions_are_samples_that_no_rule_picks(prm_run, tmp_path):
    asked = [{"prompt": f"^{a}+1=", "response": r, "label": int(bool(r))} for a in range(3) for r in ("", "2;#2", "")]
    asked += [{"prompt": "^4+1=", "response": "", "label": 0}] * 3
    out = tmp_path / "out"
    assert rerank(prm_run / "prm", out, f"--input={write_jsonl(tmp_path / 'rows.jsonl', asked)}") == 0
    found = results(out)["methods"]
    for method in ("pass", "sum", "mean", "min", "last", "majority", "vote_sum"):
        assert [entry["mean"] for entry in found[method]] == pytest.approx([1 / 4, 2 / 4, 3 / 4])
    written = [json.loads(line) for line in (out / "scored.jsonl").read_text().splitlines()]
    assert [row["reward"] is None for row in written] == [row["response"] == "" for row in asked]


def test_what_has_no_verdict_is_left_out_aloud(prm_run, tmp_path):
    asked = [{"prompt": "^1+1=", "completion": "2;#2", "score": score} for score in (1.0, None, 0.5)]
    path = write_jsonl(tmp_path / "rows.jsonl", asked)
    with pytest.warns(UserWarning, match="1 responses without a verdict are left out"):
        assert rerank(prm_run / "prm", tmp_path / "out", f"--input={path}", "--n=[2]") == 0
    assert results(tmp_path / "out")["methods"]["pass"][0]["mean"] == 1.0


def test_fresh_completions(prm_run, warm_model, tmp_path):
    out = tmp_path / "out"
    sampled = (
        f"--sample.model={warm_model}",
        "--sample.engine=prime_lightning.engines.hf.HFEngine",
        "--sample.prompts=prime_lightning.prompts.ArithmeticPrompts",
        "--sample.prompts.operations=2",
        "--sample.problems=12",
        "--sample.sampling={samples: 4, max_tokens: 8}",
    )
    assert rerank(prm_run / "prm", out, *sampled, "--prm.reference=null", "--rules=[sum]") == 0
    found = results(out)
    assert (found["problems"], found["reference"]) == (12, False)
    assert set(found["methods"]) == {"pass", "sum", "majority", "vote_sum"}
    for line in (out / "scored.jsonl").read_text().splitlines():
        row = json.loads(line)
        value = DIGITS[Chains(operations=2).results(row["prompt"])[-1]]
        assert row["score"] == float(row["completion"].rpartition("#")[2] == value)
        assert row["final"] in (None, row["completion"].rpartition("#")[2])
        assert row["reward"] == pytest.approx(sum(row["step_rewards"]), abs=1e-5)


def test_programs_have_no_votes_and_right_answers_are_one_candidate():
    def problem(texts, labels, kind):
        rows = [{"prompt": "p", "completion": t, "score": o} for t, o in zip(texts, labels, strict=True)]
        return group([Rollout.from_row(row, "", kind=kind) for row in rows], [[0.0]] * len(texts), ["sum"])

    programs = problem(["print(1)", "print(2)", "print(3)"], [1.0, 0.0, 0.9], "code")
    found = compare(programs, [1], ["sum"], sets=8, seed=0)["methods"]
    assert set(found) == {"pass", "sum"}
    assert [row[0]["mean"] for row in found.values()] == pytest.approx([1 / 3, 1 / 3])  # nearly right is wrong
    texts = [r"\boxed{0.5}", r"\boxed{\frac12}", r"\boxed{3}", r"\boxed{3}", r"\boxed{4}"]
    found = compare(problem(texts, [1.0, 1.0, 0.0, 0.0, 0.0], "math"), [5], ["sum"], sets=8, seed=0)
    assert found["methods"]["majority"][0]["mean"] == 0.5  # two votes each
    assert "| majority | 0.500 (0.500 to 0.500) |" in table(found)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "from either --input or --sample.model, got both or neither"),
        (["--sample.model=x"], "Expected --sample.prompts and --sample.engine"),
        (["--input=ROWS", "--n=[8]"], "Expected --n from 1 to 4, the fewest samples that a problem has"),
        (["--input=ROWS", "--rules=[max]"], "Expected rules out of sum, mean, min, last, got max"),
        (["--input=UNLABELLED"], "Expected the column label, labels, score, or an answer to grade against"),
        (["--input=UNKNOWN"], "Expected responses with a verdict"),
    ],
)
def test_what_cannot_be_reranked_is_refused(more, words, prm_run, rows, tmp_path, capsys):
    unlabelled = write_jsonl(tmp_path / "unlabelled.jsonl", [{"prompt": "1", "response": "2"}])
    unknown = write_jsonl(tmp_path / "unknown.jsonl", [{"prompt": "1", "completion": "2", "score": None}])
    places = {"ROWS": rows, "UNLABELLED": unlabelled, "UNKNOWN": unknown}
    more = [re.sub("|".join(sorted(places, key=len)[::-1]), lambda m: places[m[0]], option) for option in more]
    assert rerank(prm_run / "prm", tmp_path / "out", *more) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_sizes_are_powers_of_two_and_all():
    class Six:
        outcomes = (0,) * 6

    assert sizes([Six()], None) == [1, 2, 4, 6]
