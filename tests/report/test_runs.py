"""Reading what runs leave behind: several starts, crashes, folders that are none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.report.runs import differences, join, read_metrics, read_run


def start(folder, version, text, config="seed_everything: 0\n"):
    place = folder / "csv" / f"version_{version}"
    place.mkdir(parents=True)
    (place / "metrics.csv").write_text(text)
    (place / "config.yaml").write_text(config)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 6)), max_size=5))
def test_joined_starts_are_what_the_last_start_at_or_before_a_step_says(starts):
    rows = [{step: {"loss": 100.0 * k + step} for step in range(a, a + n)} for k, (a, n) in enumerate(starts)]
    expected = {}
    for step in range(20):
        before = [k for k, (a, _) in enumerate(starts) if a <= step]
        if before and step in rows[before[-1]]:
            expected[step] = rows[before[-1]][step]
    assert join(rows) == expected


def test_versions_join_by_number_and_evaluations_stay(tmp_path):
    start(tmp_path, 0, "loss,step,val/pass1\n9,0,\n8,1,\n,1,0.25\n7,2,\n")
    start(tmp_path, 2, "loss,step\n5,1\n")
    start(tmp_path, 10, "loss,step\n4,2\n")
    assert read_run(tmp_path).rows == {0: {"loss": 9}, 1: {"loss": 5, "val/pass1": 0.25}, 2: {"loss": 4}}


@pytest.mark.parametrize("tail", ["", "1.2", "1.25,1", "\0\0\0", "nan,,", '"unclosed'])
def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path, tail):
    path = tmp_path / "metrics.csv"
    path.write_text(f"loss,step\n1.5,0\n{tail}")
    assert read_metrics(path) == {0: {"loss": 1.5}}


def test_seeds_are_runs_that_differ_in_nothing_else(tmp_path):
    config = (
        "seed_everything: {seed}\ntrainer: {{default_root_dir: {root}}}\nmodel: {{policy: {root}/warm, beta: {beta}}}\n"
    )
    runs = []
    for name, seed, beta in (("a", 0, 0.5), ("b", 1, 0.5), ("c", 0, 0.1)):
        text = config.format(seed=seed, root=tmp_path / name, beta=beta)
        start(tmp_path / name, 0, "loss,step\n1,0\n", text)
        runs.append(read_run(tmp_path / name))
    assert runs[0].settings == runs[1].settings != runs[2].settings
    assert differences(runs) == [{"model.beta": 0.5}, {"model.beta": 0.5}, {"model.beta": 0.1}]
    assert [run.seed for run in runs] == [0, 1, 0]


def test_benchmarks_with_broken_lines(tmp_path):
    good = {"iteration": 3, "benchmark": "gsm8k", "problems": 5, "samples": 1, "seconds": 1.5}
    good |= {"metrics": {"pass1": 0.5, "odd": None}, "interval": {"pass1": [0.25, 0.75]}}
    lines = [json.dumps(good), "null", '{"iteration": 1}', json.dumps(good)[:40]]
    (tmp_path / "benchmarks.jsonl").write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert run.benchmarks == [good]
    assert any("3 lines of benchmarks.jsonl" in note for note in run.notes)


def test_what_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is no folder"):
        read_run(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="Expected the folder of a run"):
        read_run(tmp_path)
