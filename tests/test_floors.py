"""Imports go downwards only, and each heavy package has its doors. CONTRIBUTING.md says what the rooms know."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prime_lightning"
FLOORS = [
    {"rollout", "algorithms"},
    {"verifiers", "models", "report"},
    {"prompts", "engines"},
    {"sampling"},
    {"evaluation"},
    {"training"},
    {"prm"},
    {"cli"},
    {"__main__"},
]
"""Rooms: a folder, or a file of the top level."""
DOORS = {
    "vllm": {"engines"},
    "deepspeed": {"training.strategies.deepspeed"},
    "evaluate": {"evaluation.metrics"},
    "peft": {"models.lora", "models.pretrained"},
    "plotly": {"report.page"},
    "jinja2": {"report.page"},
    "rich": {"models.third_party_bars", "training.callbacks", "verifiers", "cli.commands"},
    "tqdm": {"models.third_party_bars"},
    "liger_kernel": {"models.fused", "models.kernels"},
    "cut_cross_entropy": {"models.fused"},
    "datasets": {"prompts", "evaluation.metrics", "cli.api"},
    "sympy": {"verifiers"},
    "math_verify": {"verifiers"},
    "lightning": {"sampling.datamodule", "training", "evaluation.callback", "prm.train", "cli", "__main__"},
    "torch": {
        "algorithms",
        "models",
        "prompts",
        "engines",
        "sampling",
        "training",
        "evaluation",
        "prm",
        "cli",
        "__main__",
    },
    "transformers": {"models", "prompts", "engines", "sampling", "training", "evaluation", "prm", "cli", "__main__"},
}
"""Through which rooms or files a package comes in."""


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text())


def imports(tree):
    """Every imported module's full name; `from a import b` gives a.b if that is a module of ours, else a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for full in (f"{node.module}.{alias.name}" for alias in node.names):
                place = PACKAGE.parent / full.replace(".", "/")
                yield full if place.with_suffix(".py").is_file() or place.is_dir() else node.module


GRAPH = {name: set(imports(tree)) for name, tree in modules()}
OWN = {
    name: {i.removeprefix("prime_lightning.") for i in found if i.removeprefix("prime_lightning.") in GRAPH} - {name}
    for name, found in GRAPH.items()
}


def room(name):
    return name.split(".")[0]


def floor(name):
    found = [i for i, rooms in enumerate(FLOORS) if room(name) in rooms]
    assert found, f"{name} stands on no floor; add its room to FLOORS and CONTRIBUTING.md"
    return found[0]


@pytest.mark.parametrize("name", GRAPH)
def test_imports_go_downwards(name):
    for other in OWN[name]:
        same = room(other) == room(name)
        assert same or floor(other) < floor(name), (
            f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"
        )


@pytest.mark.parametrize("name", [n for n in GRAPH if room(n) == "verifiers"])
def test_verifiers_know_only_prompts_and_verdicts(name):
    assert {room(other) for other in OWN[name]} <= {"verifiers", "rollout"}


def test_no_import_cycle():
    TopologicalSorter(OWN).prepare()  # raises on a cycle


@pytest.mark.parametrize("package", DOORS)
def test_heavy_packages_use_their_doors(package):
    for name, found in GRAPH.items():
        if any(i == package or i.startswith(f"{package}.") for i in found):
            assert any(name == door or name.startswith(f"{door}.") for door in DOORS[package]), f"{name}: {package}"


def test_rooms_can_be_overlooked():
    shown = {path.name for path in PACKAGE.iterdir()} - {"py.typed", "__pycache__"}
    assert len(shown) <= 14, shown
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}:
        assert len(list(folder.glob("*.py"))) <= 14, folder


def test_every_file_is_short_and_says_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        assert ast.get_docstring(ast.parse(text)), path
