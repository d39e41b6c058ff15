"""What the README says to type is typed, on a small scale."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prime_lightning.__main__ import main

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands():
    """Every line of the bash blocks, continued lines joined, comments cut."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield shlex.split(line, comments=True)


@pytest.mark.slow
def test_the_quickstart_command(tmp_path, capsys):
    """The README's first command, with a short warm start and two iterations."""
    typed = next(words for words in commands() if "quickstart" in words)
    args = typed[typed.index("prime-lightning") + 1 :]
    out = tmp_path / "quickstart"
    args[args.index("--out") + 1] = str(out)
    assert main([*args, "--lessons", "12800", "--iterations", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("$ prime-lightning") == 4
    assert "PRIME took the tiny model from" in said
    assert said.splitlines()[-1] == f"Report: {out / 'report.html'}"
    for name in (
        "report.html",
        "summary.json",
        "rollouts.jsonl",
        "benchmarks.jsonl",
        "policy/config.json",
        "prm/config.json",
    ):
        assert (out / name).is_file(), name
    curve = [json.loads(line) for line in (out / "benchmarks.jsonl").read_text().splitlines()]
    assert [(row["benchmark"], row["iteration"], row["problems"]) for row in curve] == [
        ("arithmetic", 0, 250),
        ("arithmetic", 2, 250),
    ]
    for row in curve:
        low, high = row["interval"]["accuracy"]
        assert low < row["metrics"]["accuracy"] < high
    assert json.loads((out / "prm" / "implicit_prm.json").read_text())["steps"] == {"rule": "text", "separator": ";"}
    assert main([*args]) == 2  # nothing is overwritten
    assert "Expected a new or empty folder" in capsys.readouterr().err


def test_the_test_command_is_what_ci_runs():
    typed = next(words for words in commands() if "tox" in words)
    assert shlex.join(typed).replace("'&&'", "&&") in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.parametrize("words", [w for w in commands() if w[:2] == ["prime-lightning", "fit"]], ids=" ".join)
def test_the_fit_commands_parse(words, monkeypatch, capsys):
    """With `--print_config`, all layers are read and checked; nothing is built."""
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["policy"]


def test_the_python_block_runs(warm_model, tmp_path):
    code = next(b for b in blocks("python") if "pl.Trainer" in b)
    code = code.replace("runs/quickstart/warm/policy", str(warm_model)).replace("(seed=1)", "(seed=1, operations=2)")
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target


def test_yaml_blocks_name_options_that_exist():
    options = (Path(__file__).parent / "golden" / "options.txt").read_text().split()
    for block in blocks("yaml"):
        for section, values in yaml.safe_load(block).items():
            assert all(f"{section}.{name}" in options for name in values)
