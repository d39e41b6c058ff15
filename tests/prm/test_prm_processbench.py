"""First errors: F1 and the threshold against brute force, the sample file, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prm_rows import arithmetic_rows
from toys import write_jsonl

from prime_lightning.__main__ import main
from prime_lightning.cli.commands.processbench import split, step_scores
from prime_lightning.prm import ImplicitPRM
from prime_lightning.prm.first_error import best_threshold, f1, predict
from prime_lightning.prompts.arithmetic import Chains, step_truth
from prime_lightning.prompts.dataset import load_rows

SAMPLE = Path(__file__).parent.parent.parent / "evals" / "processbench" / "arithmetic.jsonl"
SCORES = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0])


@st.composite
def judged(draw):
    """Step scores and labels, with at least one response of each kind."""
    scores = draw(st.lists(st.lists(SCORES, min_size=1, max_size=4), min_size=2, max_size=7))
    labels = [draw(st.integers(-1, len(s) - 1)) for s in scores]
    labels[0], labels[1] = -1, draw(st.integers(0, len(scores[1]) - 1))
    return scores, labels


def slow_f1(scores, labels, threshold):
    hits = {True: [], False: []}
    for steps, label in zip(scores, labels, strict=True):
        found = -1
        for i, score in enumerate(steps):
            if score < threshold:
                found = i
                break
        hits[label != -1].append(found == label)
    a, b = (sum(h) / len(h) for h in hits.values())
    return {"error": a, "correct": b, "f1": 2 * a * b / (a + b) if a + b else 0.0}


@settings(deadline=None)
@given(judged(), st.sampled_from([-3.0, -0.75, 0.0, 0.2, 2.0]))
def test_f1_is_the_harmonic_mean_of_two_accuracies(case, threshold):
    assert f1(*case, threshold) == pytest.approx(slow_f1(*case, threshold))


@settings(deadline=None)
@given(judged())
def test_no_threshold_is_better_than_the_best(case):
    scores, labels = case
    best = slow_f1(scores, labels, best_threshold(scores, labels))["f1"]
    values = sorted({s for steps in scores for s in steps})
    tried = [values[0] - 1, *values, *(v + 1e-6 for v in values)]
    assert best == pytest.approx(max(slow_f1(scores, labels, t)["f1"] for t in tried))


def test_both_kinds_are_needed():
    for labels in ([-1, -1], [0, 0]):
        with pytest.raises(ValueError, match=r"Expected responses with an error .* got [02] and [02]"):
            best_threshold([[0.0], [1.0]], labels)
        with pytest.raises(ValueError, match="Expected responses with an error"):
            f1([[0.0], [1.0]], labels, 0.0)


def test_the_rows_of_a_problem_stay_together():
    rows = [{"problem": str(i % 7), "label": i} for i in range(30)]
    tune, scored = split(rows, 0.4, seed=1)
    assert sorted(r["label"] for r in tune + scored) == list(range(30))
    assert not {r["problem"] for r in tune} & {r["problem"] for r in scored}
    assert len({r["problem"] for r in tune}) == 3


def test_the_sample_file_is_what_the_package_makes_and_its_labels_are_true():
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    assert rows == arithmetic_rows(len(rows), seed=0, operations=10)
    assert 0.2 < np.mean([row["label"] >= 0 for row in rows]) < 0.8
    for row in rows:
        truth = step_truth(row["problem"], "".join(row["steps"]), Chains())
        assert (truth.index(False) if False in truth else -1) == row["label"]
        assert row["final_answer_correct"] or row["label"] >= 0


def run(prm, data, output, *more):
    plain = ("--joiner=", "--chat=false", f"--prm.folder={prm}", f"--out={output}")
    return main(["processbench", f"--input={data}", *plain, *map(str, more)])


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("bench") / "b.jsonl", arithmetic_rows(120, seed=4, operations=2))


@pytest.mark.parametrize("how", ["sum", "mean", "prefix"])
def test_the_command_finds_first_errors(prm_run, bench, tmp_path, capsys, how):
    out = tmp_path / "out.json"
    assert run(prm_run / "prm", bench, out, f"--score={how}") == 0
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    assert f"First-error F1 {result['f1']:.3f}" in said
    assert f"chosen on {result['tuned_on']} other" in said
    assert (result["scored"], result["tuned_on"]) == (len(result["labels"]), 120 - len(result["labels"]))
    hits = {True: [], False: []}
    for found, label in zip(result["predictions"], result["labels"], strict=True):
        hits[label >= 0].append(found == label)
    assert (result["error"], result["correct"]) == pytest.approx((np.mean(hits[True]), np.mean(hits[False])))
    assert result["interval"][0] <= result["f1"] <= result["interval"][1]
    tune, scored = split([dict(row) for row in load_rows(bench, split="train", name=None, revision=None)], 0.5, seed=0)
    prm = ImplicitPRM.from_pretrained(prm_run / "prm")
    given = step_scores(prm, tune, joiner="", chat=False, how=how)
    assert result["threshold"] == pytest.approx(best_threshold(given, [row["label"] for row in tune]))
    assert result["labels"] == [row["label"] for row in scored]
    assert result["f1"] > 0.6  # the PRM learned from this teacher's outcomes, and finds its mistakes
    assert run(prm_run / "prm", bench, out) == 2
    assert "Expected a new file" in capsys.readouterr().err


def test_the_threshold_comes_from_the_other_file(prm_run, bench, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run(prm_run / "prm", bench, out, f"--tune={bench}") == 2
    assert "Expected other problems in --tune than in --input" in capsys.readouterr().err
    longer = write_jsonl(tmp_path / "longer.jsonl", arithmetic_rows(60, seed=77, operations=3))
    assert run(prm_run / "prm", bench, out, f"--tune={longer}") == 0
    result = json.loads(out.read_text())
    assert (result["scored"], result["tuned_on"]) == (120, 60)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": "p", "steps": ["a"]}, "got none named label"),
        ({"problem": "p", "steps": [], "label": -1}, "Expected a list of step texts, none of them empty, in line 1 of"),
        ({"problem": "p", "steps": ["a", " "], "label": -1}, "none of them empty, in line 1 of"),
        ({"problem": "p", "steps": ["a"], "label": 1}, "Expected a label from -1 to 0 in line 1 of .* got 1"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(row, words, prm_run, tmp_path, capsys):
    import re

    assert run(prm_run / "prm", write_jsonl(tmp_path / "b.jsonl", [row]), tmp_path / "o.json") == 2
    assert re.search(words, capsys.readouterr().err)


def test_predictions_by_example():
    assert predict([0.0, 0.0], 0.0) == -1
    assert predict([0.0, -0.1], 0.0) == 1
