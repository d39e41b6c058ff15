"""Files that tell other services of the repository: citation, forms of issues, hooks, extras, versions, an image."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prime_lightning
from prime_lightning.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(*parts):
    return yaml.safe_load(ROOT.joinpath(*parts).read_text())


def test_the_citation_is_of_this_version():
    cited = read("CITATION.cff")
    assert cited["version"] == prime_lightning.__version__
    assert cited["license"] == PROJECT["license"]
    assert cited["title"] == PROJECT["name"]


@pytest.mark.parametrize("form", sorted(p.name for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")))
def test_forms_of_issues_are_forms(form):
    found = read(".github", "ISSUE_TEMPLATE", form)
    assert {"name", "description", "body"} <= found.keys()
    assert all({"type", "id", "attributes"} <= part.keys() for part in found["body"])
    asked = str(found["body"])
    if form == "bug.yml":
        assert "prime-lightning doctor" in asked
        assert "doctor" in COMMANDS


def test_hooks_do_what_lint_does():
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    lint = (ROOT / "tox.ini").read_text().partition("[testenv:lint]")[2].partition("[testenv:type]")[0]
    assert {hook["entry"].split()[0] for hook in hooks} == {"ruff", "codespell"}
    assert all(need in lint for hook in hooks for need in hook["additional_dependencies"])


def test_all_is_every_part_that_users_may_add():
    parts = PROJECT["optional-dependencies"]
    (named,) = parts["all"]
    assert set(named.split("[")[1].rstrip("]").split(",")) == parts.keys() - {"all", "docs", "test", "dev"}


def test_the_lock_is_within_the_bounds_and_whole():
    lines = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    parts = [PROJECT["optional-dependencies"][part] for part in ("lora", "deepspeed", "wandb")]
    for need in map(Requirement, sum(parts, PROJECT["dependencies"])):
        assert need.specifier.contains(locked[canonicalize_name(need.name)]), need


def test_the_image_installs_what_there_is_and_starts_a_command(monkeypatch, capsys):
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    told = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert told[0][0] == "FROM"
    assert {word for word, _ in told} <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    (extras,) = [re.findall(r'"\.\[(.*)\]"', rest)[0].split(",") for _, rest in told if "pip install" in rest]
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    (entry,), (command,) = [json.loads(rest) for word, rest in told if word in ("ENTRYPOINT", "CMD")]
    assert entry in PROJECT["scripts"]
    assert command in COMMANDS
    monkeypatch.chdir(ROOT)
    for fit in re.findall(r"prime-lightning (fit .*)", "\n".join(lines)):
        with pytest.raises(SystemExit, match="0"):
            main([*fit.split(), "--print_config"])
        assert "policy" in capsys.readouterr().out
