"""The `evaluate` modules by their cases, offline, and the torchmetrics state that adds their values up."""

import json
import math
import re
from pathlib import Path

import evaluate
import pytest

from prime_lightning.evaluation.metrics import load_metric
from prime_lightning.evaluation.statistics import mean_and_error
from prime_lightning.evaluation.table import ProblemTable, problem_values

FOLDER = Path(__file__).parents[2] / "evals" / "metrics"
CASES = [(path.parent, case) for path in sorted(FOLDER.glob("*/cases.json")) for case in json.loads(path.read_text())]


@pytest.mark.parametrize(("folder", "case"), CASES, ids=lambda x: x.name if isinstance(x, Path) else x["says"][:30])
def test_cases(folder, case):
    metric = evaluate.load(str(folder))
    given = {"predictions": case["predictions"], "references": case["references"]}
    assert metric.compute(**given, **case.get("options", {})) == pytest.approx(case["expected"])


@pytest.mark.parametrize("folder", sorted(FOLDER.iterdir()), ids=lambda p: p.name)
def test_each_has_a_readme_whose_example_is_true(folder, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    code = re.search(r"```python\n(.*?)```\n\n-", (folder / "README.md").read_text(), re.DOTALL).group(1)
    *lines, last = code.strip().splitlines()
    call, _, said = last.partition("  # ")
    scope = {}
    exec("\n".join(lines), scope)
    assert eval(call, scope) == eval(said)


def test_unknown_names_and_foreign_metrics_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a metric of \['majority_vote', 'math_accuracy', 'pass_at_k'\]"):
        load_metric("accuracy")
    own = tmp_path / "plain"
    own.mkdir()
    source = "import evaluate\nclass Plain(evaluate.Metric):\n    def _info(self):\n        import datasets\n"
    features = "datasets.Features({'predictions': datasets.Value('string'), 'references': datasets.Value('string')})"
    info = f"evaluate.MetricInfo(description='', citation='', inputs_description='', features={features})"
    (own / "plain.py").write_text(f"{source}        return {info}\n")
    with pytest.raises(ValueError, match="to be a subclass of prime_lightning"):
        load_metric(str(own))


def rows():
    return [
        [
            {"completion": "\\boxed{1}", "score": float((i + k) % 3 == 0), "length": 5 + k, "finish": "stop"}
            for k in range(4)
        ]
        for i in range(7)
    ]


def test_all_values_of_a_problem():
    record = {"completion": "\\boxed{1}", "score": 1.0, "length": 3, "finish": "stop"}
    cut = {**record, "completion": "", "score": 0.0, "length": 9, "finish": "length"}
    lost = {**record, "score": None}
    metrics = [load_metric(name) for name in ("math_accuracy", "pass_at_k", "majority_vote")]
    values = problem_values(metrics, [record, cut, lost, record])
    assert values.pop("pass4") != values.get("pass4")  # NaN: only three verdicts are known
    assert values == pytest.approx(
        {"avg4": 2 / 3, "pass1": 2 / 3, "pass2": 1.0, "maj4": 1.0, "truncated": 0.25, "length": 4.5, "unknown": 1.0}
    )


def test_one_sample_has_one_share_and_programs_do_not_vote():
    record = {"completion": "\\boxed{1}", "score": 1.0, "length": 3, "finish": "stop"}
    metrics = [load_metric(name) for name in ("math_accuracy", "pass_at_k", "majority_vote")]
    assert set(problem_values(metrics, [record])) == {"accuracy", "truncated", "length", "unknown"}
    assert problem_values([load_metric("pass_at_k")], [record])["pass1"] == 1.0
    assert math.isnan(load_metric("majority_vote", "code").problem(["a", "b"], [1.0, 0.0])["maj2"])
    assert load_metric("majority_vote", "exact").problem(["#1", "#2", "#2"], [1.0, 0.0, 0.0])["maj3"] == 0.0


def test_the_table_gives_means_errors_and_intervals_and_leaves_unknown_out():
    table = ProblemTable(["accuracy", "length", "unknown"], samples=1)
    for accuracy, length, unknown in ((1.0, 3, 0), (0.0, 5, 0), (math.nan, 7, 1)):
        table.update({"accuracy": accuracy, "length": length, "unknown": unknown})
    result = table.compute()
    assert result["problems"] == 3
    assert result["metrics"] == {"accuracy": 0.5, "length": 5.0, "unknown": 1.0}
    assert result["stderr"]["accuracy"] == mean_and_error([1.0, 0.0])[1]
    assert set(result["interval"]) == {"accuracy"}


def test_a_table_without_problems_is_empty_and_says_so():
    result = ProblemTable(["accuracy"], samples=1).compute()
    assert result["problems"] == 0
    assert math.isnan(result["metrics"]["accuracy"])
