"""The page as a file: self-contained, escaped, small, written at once; and the command's messages."""

import base64
import hashlib
import json
import os
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.__main__ import main
from prime_lightning.cli.commands.report import watch
from prime_lightning.report import credit_view, page, write_report
from prime_lightning.report.runs import read_run
from report.lines import HOSTILE, row, write_rollouts


class Scripts(HTMLParser):
    """Scripts of a page, their attributes and the policy."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.policy, self.inside, self.tags = [], "", False, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append((dict(attrs), ""))
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            attrs, text = self.scripts[-1]
            self.scripts[-1] = attrs, text + data


def data_of(text):
    [found] = [body for attrs, body in Scripts(text).scripts if attrs.get("id") == "data"]
    return json.loads(found)


@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists, max_leaves=5))
def test_embedded_json_is_inert_and_whole(value):
    text = page.embedded(value)
    assert text.isascii()
    assert not set(text) & set("<>&\n\r\0")
    assert json.loads(text) == value


def test_hostile_runs_make_a_page_with_our_scripts_only(hostile_folder, tmp_path):
    text = write_report([hostile_folder], tmp_path / "r.html").read_text()
    found = Scripts(text)
    assert len(found.scripts) == 5  # data, plotly, common, credit, plots
    for attrs, body in found.scripts:
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert (f"'sha256-{digest}'" in found.policy) == (attrs == {})
    assert found.policy.startswith("default-src 'none';")
    assert "unsafe-eval" not in found.policy
    assert not any({"src", "href"} & set(attrs) - {"href"} for _, attrs in found.tags)
    assert [attrs["href"] for tag, attrs in found.tags if "href" in attrs] == ["data:,"]
    groups = data_of(text)["credit"][0]["groups"]
    assert [g["responses"][0]["tokens"][0] for g in groups] == HOSTILE


def test_a_page_of_a_real_run(run_folder, tmp_path):
    data = page.payload([read_run(run_folder)])
    assert data["notes"] == []
    [run] = data["runs"]
    lines = [json.loads(line) for line in (run_folder / "rollouts.jsonl").open()]
    assert run["steps"] == [0, 1, 2, 3]
    responses, tokens = run["metrics"]["rollout/responses"], run["metrics"]["rollout/tokens"]
    assert run["axes"]["rollouts"] == [sum(responses[:i]) for i in range(4)]
    assert run["axes"]["tokens"] == pytest.approx([sum(tokens[:i]) for i in range(4)], abs=0.1)
    assert {"time/sample", "time/verify", "time/prm", "time/policy", "time/sync"} <= {
        name for name, _ in data["phases"]
    }
    shown = {name for section in data["sections"] for panel in section["panels"] for name in panel["names"]}
    assert shown == {name for name in run["metrics"] if not name.startswith("time/")}
    assert sum(len(g["responses"]) for g in data["credit"][0]["groups"]) == len(lines)


def test_a_hundred_thousand_rollouts_and_500_iterations_stay_below_10_mb(tmp_path):
    names = [f"group{i % 7}/metric{i}" for i in range(120)]
    numbers = "\n".join(
        ",".join([str(step), *(f"{(step * i) % 97 / 7:.6f}" for i in range(120))]) for step in range(500)
    )
    (tmp_path / "metrics.csv").write_text(f"step,{','.join(names)}\n{numbers}\n")
    line = json.dumps(row(tokens=["word "] * 20))
    with (tmp_path / "rollouts.jsonl").open("w") as file:
        for i in range(100_000):
            file.write(line.replace('"iteration": 0, "draw": 0', f'"iteration": {i // 200}, "draw": {i // 4}') + "\n")
    out = write_report([tmp_path], tmp_path / "r.html")
    assert 5e6 < out.stat().st_size < 10e6
    data = data_of(out.read_text())
    [note] = data["notes"]
    assert "of 100,000 logged rollouts" in note
    shown = {group["iteration"] for group in data["credit"][0]["groups"]}
    assert len(shown) == 500
    assert len(data["runs"][0]["steps"]) == 500


def test_seeds_make_one_group(tmp_path):
    folders = []
    for name, beta in (("prime-seed0", 1), ("prime-seed1", 1), ("other", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.csv").write_text("loss,step\n1,0\n2,1\n")
        (folder / "config.yaml").write_text(f"seed_everything: {len(folders)}\nmodel: {{beta: {beta}}}\n")
        folders.append(folder)
    data = page.payload([read_run(folder) for folder in folders])
    assert data["groups"] == [{"name": "prime (2 seeds)", "runs": [0, 1]}, {"name": "other", "runs": [2]}]
    assert len([note for note in data["notes"] if "no rollouts.jsonl" in note]) == 3


def test_a_failed_report_leaves_the_old_one(tmp_path, run_folder, monkeypatch):
    out = tmp_path / "r.html"
    out.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_report([run_folder], out)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert out.read_text() == "old"


def test_watch_writes_when_data_came(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "run", tmp_path / "r.html"
    steps = iter(
        [
            lambda: None,
            lambda: write_rollouts(folder, [row()]),
            lambda: None,
            lambda: write_rollouts(folder, [row(), row(1)]),
        ]
    )
    monkeypatch.setattr("time.sleep", lambda _: next(steps, lambda: None)())
    assert watch([str(folder)], out, 7, rounds=6) == 2
    assert capsys.readouterr().out.count("Waiting for the first data") == 1
    text = out.read_text()
    assert ("meta", {"http-equiv": "refresh", "content": "7"}) in Scripts(text).tags
    assert [g["iteration"] for g in data_of(text)["credit"][0]["groups"]] == [0, 1]


def test_the_command_writes_into_the_run_or_says_what_is_wrong(tmp_path, capsys):
    folder = write_rollouts(tmp_path / "run", [])
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"Report: {folder / 'report.html'}\n"
    assert "rollouts.jsonl has no rollouts (yet)" in (folder / "report.html").read_text()
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "which is no folder"),
        ([str(tmp_path)], "Expected the folder of a run"),
        ([str(folder), "--out", str(folder)], "Expected a file for --out"),
        ([str(folder), "--watch", "-1"], "positive number of seconds"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_credit_view_of_a_notebook(hostile_folder, tmp_path):
    text = credit_view(hostile_folder)._repr_html_()
    [(tag, attrs)] = Scripts(text).tags
    assert (tag, attrs["sandbox"]) == ("iframe", "allow-scripts")
    assert len(data_of(attrs["srcdoc"])["credit"][0]["groups"]) == len(HOSTILE)
    assert len(attrs["srcdoc"]) < 100_000  # without the plotting library
    with pytest.raises(ValueError, match=r"Expected a rollouts\.jsonl"):
        credit_view(write_rollouts(tmp_path / "empty", []))
