"""Every block of README.md and docs/**/*.md is run, or at least read: commands with all their layers, YAML, Python.

Python runs page by page in one namespace. A block with a title is a file of that name, which later blocks of its page
may import or name. A comment in front of a block says what it lacks here, such as `<!-- needs: gpu -->` or `hub`; such
Python is only compiled, as is what names the folder of a run. Commands are not run, but read with all their layers.
"""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from prime_lightning.__main__ import COMMANDS, main
from prime_lightning.cli.lightning_cli import TRAINED

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- needs: (?P<needs>[\w, ]+) -->\n+)?^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n"
    r"(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
OF_FIT = {"--config", "--trainer", "--model", "--data"}  # which commands around a run hand on
PARSED = {"fit", "validate", "test", "predict", *TRAINED}


def blocks(page):
    return [found.groupdict() for found in FENCE.finditer(page.read_text())]


def commands(page):
    """The `prime-lightning` commands of a page: of bash blocks, and of lines that are indented as code."""
    text = FENCE.sub("", page.read_text())
    indented = re.findall(r"^ {4}((?:prime-lightning .*\\\n(?:.*\\\n)*.*)|prime-lightning .*)$", text, re.MULTILINE)
    fenced = [block["text"] for block in blocks(page) if block["language"] in ("bash", "sh", "shell", "console")]
    for part in [*indented, *fenced]:
        for line in part.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if "prime-lightning" in words and not any("..." in word for word in words):
                yield tuple(words[words.index("prime-lightning") + 1 :])


def yamls(page):
    return [
        b
        for b in blocks(page)
        if b["language"] == "yaml" and not b["needs"] and re.match(r"(?:\w+:)", b["text"].lstrip("# \n"))
    ]


def name(page):
    return page.relative_to(REPOSITORY).as_posix()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the shipped configurations and the titled files of a page."""

    def of(page):
        for folder in ("conf", "evals"):
            (tmp_path / folder).symlink_to(REPOSITORY / folder)
        for block in blocks(page):
            if block["title"]:
                (tmp_path / block["title"]).write_text(block["text"])
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")  # of workers
        importlib.invalidate_caches()
        return tmp_path

    return of


def parsed(*words):
    """The command reads its layers and options without complaint; nothing is built."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code == 0, f"{shlex.join(words)}: {err.getvalue()}"
    return out.getvalue()


SEEN: set[tuple[str, ...]] = set()


@pytest.mark.parametrize("page", [p for p in PAGES if any(commands(p))], ids=name)
def test_commands_exist_with_their_options(page, place):
    place(page)
    for words in commands(page):
        if words in SEEN or words[0].startswith("-"):
            continue
        SEEN.add(words)
        if words[0] in PARSED:
            parsed(*words)
            continue
        assert words[0] in COMMANDS, words
        helped = io.StringIO()
        subcommands = [words[:n] for n in (1, 2) if not words[n - 1 : n] or not words[n - 1].startswith("-")]
        for called in subcommands:
            with (
                contextlib.redirect_stdout(helped),
                contextlib.redirect_stderr(helped),
                contextlib.suppress(SystemExit),
            ):
                main([*called, "--help"])
        roots = {re.split(r"[.=]", word)[0] for word in words if word.startswith("--")} - OF_FIT
        assert [root for root in roots if root not in helped.getvalue()] == [], shlex.join(words)


@pytest.mark.parametrize("page", [p for p in PAGES if yamls(p)], ids=name)
def test_yaml_is_a_layer(page, place):
    folder = place(page)
    layers = []
    for i, block in enumerate(yamls(page)):
        (folder / f"layer{i}.yaml").write_text(block["text"])
        layers += ["--config", f"layer{i}.yaml"]  # all in a row: each is read, later ones win
    parsed("fit", "--config", "conf/prime.yaml", *layers)


@pytest.mark.parametrize("page", [p for p in PAGES if any(b["language"] == "python" for b in blocks(p))], ids=name)
def test_python_runs(page, place, warm_model):
    place(page)
    space = {"__name__": "__docs__"}
    for block in blocks(page):
        if block["language"] == "python":
            code = block["text"].replace("runs/quickstart/warm/policy", str(warm_model))
            code = compile(code, f"{name(page)}", "exec")
            if block["needs"] is None and "runs/" not in block["text"].replace("runs/quickstart/warm/policy", ""):
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    exec(code, space)
                assert "Traceback" not in said.getvalue()


def test_python_of_an_own_verifier_gives_a_verdict(place, capsys):
    """The one page whose output matters: the worker imports the file that the page shows."""
    page = REPOSITORY / "docs" / "own_verifier.md"
    place(page)
    exec(blocks(page)[-1]["text"], {"__name__": "__docs__"})
    assert "CORRECT" in capsys.readouterr().out


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; warnings are errors."""
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_builds_and_asks_nobody_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 20
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)\"", text)
        loaded += re.findall(
            r"<link\b(?=[^>]*rel=\"(?:stylesheet|icon|preconnect|preload)\")[^>]*href=\"([^\"]+)\"", text
        )
        assert [link for link in loaded if "//" in link] == [], page
        assert 'class="mermaid"' not in text  # its script would come from a network
    reference = (site / "reference" / "algorithms" / "index.html").read_text()
    assert "prime_lightning.algorithms.advantage.rloo" in reference
    assert (site / "pictures" / "algorithm.svg").is_file()
