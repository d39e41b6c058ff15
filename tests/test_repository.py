"""Files that tell other services of the repository: citation, forms of issues, hooks, extras."""

import tomllib
from pathlib import Path

import pytest
import yaml

import prime_lightning
from prime_lightning.__main__ import COMMANDS

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
