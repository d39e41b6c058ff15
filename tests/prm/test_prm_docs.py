"""What docs/prm.md says to type is typed, in its order, on a short run."""

import re
import shlex
from pathlib import Path

import pytest

from prime_lightning.__main__ import main

REPOSITORY = Path(__file__).parent.parent.parent
TEXT = (REPOSITORY / "docs" / "prm.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands():
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line)[1:]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, prime_run, warm_model):
    """A folder with the repository's data in it, and a short run where the quickstart's would stand."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("conf", "evals"):
        (folder / name).symlink_to(REPOSITORY / name)
    run = folder / "runs" / "quickstart"
    (run / "warm").mkdir(parents=True)
    (run / "warm" / "policy").symlink_to(warm_model)
    for path in prime_run.iterdir():
        (run / path.name).symlink_to(path)
    lines = [line for line in (run / "rollouts.jsonl").read_text().splitlines() if '"completion": ""' not in line]
    (run / "rollouts.jsonl").unlink()
    (run / "rollouts.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def smaller(words):
    """The same command with fewer problems."""
    short = {"200": "6", "{samples: 16, max_tokens: 24}": "{samples: 3, max_tokens: 8}"}
    return [short.get(word, word) for word in words]


def test_the_commands_of_the_page(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    for words in commands():
        assert main(smaller(words)) == 0, (words, capsys.readouterr().err)
    for made in (
        "exported/prm/implicit_prm.json",
        "runs/prm/prm/README.md",
        "runs/steps.jsonl",
        "runs/rerank/table.md",
    ):
        assert (desk / made).is_file(), made
    [code] = blocks("python")
    exec(compile(code, "docs/prm.md", "exec"), {})
    assert "['7;', '4;', '8;', '#8']" in capsys.readouterr().out
