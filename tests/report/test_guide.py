"""What docs/report.md says to type is typed, and its table of keys is what a run writes."""

import json
import re
import shlex
from pathlib import Path

import pytest

from prime_lightning.__main__ import main

TEXT = (Path(__file__).parents[2] / "docs" / "report.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def here(run_folder, tmp_path, monkeypatch):
    """A folder in which the guide's runs are there."""
    (tmp_path / "runs").mkdir()
    for name in set(re.findall(r"runs/([\w-]+)", TEXT)):
        (tmp_path / "runs" / name).symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines()])
def test_commands(here, line, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))  # ends --watch
    words = shlex.split(line, comments=True)
    assert main(words[1:]) == 0
    written = re.match(r"Report: ([^,\n]+)", capsys.readouterr().out)[1]
    assert "Content-Security-Policy" in Path(written).read_text()


def test_the_notebook_example(here):
    [code] = blocks("python")
    *lines, last = code.strip().splitlines()
    names = {}
    exec("\n".join(lines), names)
    assert "<iframe" in eval(last, names)._repr_html_()


def test_the_table_of_keys(run_folder):
    keys = set(json.loads((run_folder / "rollouts.jsonl").read_text().splitlines()[0]))
    table = re.findall(r"^\| (`[^|]+) \|", TEXT, re.MULTILINE)
    assert keys == {key for cell in table for key in re.findall(r"`(\w+)`", cell)}
