"""The rollouts that a page shows: whole groups, spread over the run, whatever the file looks like."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.prompts.arithmetic import step_truth, written_steps
from prime_lightning.report.rollouts import LONGEST, choose, sample_rollouts, spread
from report.lines import HOSTILE, row, write_rollouts


def test_everything_is_kept_when_it_fits(tmp_path):
    rows = [row(i, d, v) for i in (2, 0) for d in (7, 3) for v in ("correct", "wrong")]
    sampled = sample_rollouts(write_rollouts(tmp_path, rows) / "rollouts.jsonl", 10**6)
    assert [(g["iteration"], g["draw"]) for g in sampled.groups] == [(0, 7), (0, 3), (2, 7), (2, 3)]
    assert (sampled.kept, sampled.total, sampled.broken, sampled.cut) == (8, 8, 0, 0)
    group = sampled.groups[0]
    assert group["unit"] == 4.0  # scale / beta
    assert [r["verdict"] for r in group["responses"]] == ["correct", "wrong"]
    assert group["responses"][0]["process_reward"] == [0.25, -0.5]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), min_size=1, max_size=40), st.integers(0, 400))
def test_chosen_groups_keep_to_the_budget_and_cover_the_run(groups, budget):
    sizes = {(iteration, draw): size for draw, (iteration, size) in enumerate(groups)}
    chosen = choose(sizes, budget)
    assert len(set(chosen)) == len(chosen) >= 1
    assert len(chosen) == 1 or sum(sizes[group] for group in chosen) <= budget
    if sum(sizes.values()) <= budget:
        assert set(chosen) == set(sizes)
    counts = [sum(g[0] == i for g in chosen) for i, _ in groups]
    available = [sum(g[0] == i for g in sizes) for i, _ in groups]
    full = [c for c, a in zip(counts, available, strict=True) if c < a]
    assert not full or max(counts) - min(full) <= 1  # no iteration is preferred


@given(st.integers(0, 200))
def test_spread_names_each_once_and_ends_first(n):
    order = spread(list(range(n)))
    assert sorted(order) == list(range(n))
    assert order[:2] == [0, n - 1][: len(order[:2])]


def test_lines_that_are_no_rollouts_are_counted(tmp_path):
    path = write_rollouts(tmp_path, [row()]) / "rollouts.jsonl"
    bad = ["{", "[]", "null", "7", '{"iteration": "1"}', '{"iteration": 0, "tokens": [1]}', "[" * 5000, "\x00"]
    with path.open("a") as file:
        file.write("\n".join(bad) + "\n\n" + json.dumps(row())[:70])
    sampled = sample_rollouts(path, 10**6)
    assert (sampled.kept, sampled.broken) == (1, len(bad) + 1)


@pytest.mark.parametrize(
    "odd",
    [
        {"process_reward": [1.0]}, {"process_reward": "no"}, {"process_reward": [float("nan"), 1.0]},
        {"steps": [[0, "x"]]}, {"steps": 3}, {"verdict": "<b>"}, {"score": {}}, {"beta": 0}, {"scale": "x"},
        {"draw": None}, {"prompt": 5},
    ],
)  # fmt: skip
def test_odd_values_do_not_stop_a_page(tmp_path, odd):
    path = write_rollouts(tmp_path, [row(**odd)]) / "rollouts.jsonl"
    text = json.dumps(sample_rollouts(path, 10**6).groups, allow_nan=False)
    assert "<b>" not in text


def test_long_responses_are_cut_and_counted(tmp_path):
    path = write_rollouts(tmp_path, [row(tokens=["x"] * (LONGEST + 5))]) / "rollouts.jsonl"
    sampled = sample_rollouts(path, 10)
    [response] = sampled.groups[0]["responses"]
    assert (len(response["tokens"]), response["length"], sampled.cut) == (LONGEST, LONGEST + 5, 1)
    assert len(response["process_reward"]) == LONGEST


def test_hostile_text_comes_through_as_it_is(tmp_path):
    path = write_rollouts(tmp_path, [row(0, i, tokens=[text]) for i, text in enumerate(HOSTILE)]) / "rollouts.jsonl"
    assert [g["responses"][0]["tokens"] for g in sample_rollouts(path, 10**6).groups] == [[text] for text in HOSTILE]


def test_a_real_log_has_its_steps_marked(run_folder):
    lines = [json.loads(line) for line in (run_folder / "rollouts.jsonl").open()]
    assert len(lines) == 4 * 4 * 4  # iterations, groups, samples
    for line in lines:
        assert [right for _, _, right in line["steps"]] == step_truth(line["prompt"], line["completion"])
        for start, stop, _ in line["steps"]:
            assert line["tokens"][stop - 1] == ";"
            assert ";" not in line["tokens"][start : stop - 1]
    assert written_steps.__module__ == "prime_lightning.prompts.arithmetic"
