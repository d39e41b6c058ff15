"""Imports go downwards only, and each heavy guest has its doors. CONTRIBUTING.md says what the floors are."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prime_lightning"
FLOORS = [
    {
        "rollout",
        "rows",
        "algorithms.masked",
        "facts",
        "host_group",
        "shipped",
        "usage",
        "heartbeat",
        "zero",
        "packing",
        "fused",
        "evaluation",
        "evaluation.statistics",
        "evaluation.overlap",
    },
    {
        "algorithms.reward",
        "algorithms.prm_loss",
        "algorithms.health",
        "algorithms.advantage",
        "algorithms.credit",
        "algorithms.loss",
        "algorithms.surrogate",
        "algorithms.importance",
        "algorithms.shaping",
        "measures",
        "acceptance",
        "positions",
        "guests",
        "attention",
        "template",
        "head",
    },
    {
        "algorithms",
        "kernels",
        "logprobs",
        "batch",
        "options",
        "prompts",
        "tally",
        "pretrained",
        "checkpoint",
        "verifiers",
        "engines",
        "prm.steps",
        "prm.selection",
        "prm.first_error",
        "evaluation.metrics",
        "evaluation.records",
        "report.runs",
        "report.rollouts",
        "report.panels",
    },
    {"together", "arithmetic", "eurus", "replay", "loader", "balance", "engines.*", "plan.memory", "plan.timing"}
    | {"streaming"}
    | {"prm.facts", "prm.responses", "difficulty", "evaluation.rows", "evaluation.folder"}
    | {"evaluation.table", "report.page"},
    {"stepping", "ahead", "validation", "lora", "plan.shape"}
    | {"prm.folder", "evaluation.benchmark", "evaluation.runner", "report", "report.command"},
    {"panel", "passes", "placement", "sync", "scoring", "probe"},
    {"prm_learning"},
    {"module", "data", "sft", "parallel", "plan.setup", "prm.implicit"},
    {"callbacks", "alarms", "progress", "sample_table", "strategy", "watch", "plan.report"}
    | {"prm", "prm.credit", "prm.train"},
    {"last_lines", "call_config"} | {"prm.score", "evaluation.callback"},
    {"cli", "plan"},
    {"quickstart", "plan.command", "doctor"}
    | {"prm.export", "prm.rerank", "prm.processbench", "evaluation.command", "evaluation.contamination"},
    {"api"},
    {"__main__"},
]
DOORS = {
    "vllm": {"engines.*"},
    "deepspeed": {"strategy"},
    "evaluate": {"evaluation.metrics"},
    "peft": {"lora", "pretrained"},
    "plotly": {"report.page"},
    "jinja2": {"report.page"},
    "rich": {"guests", "progress", "verifiers.*", "evaluation.command", "prm.export"},
    "tqdm": {"guests"},
    "liger_kernel": {"fused", "kernels"},
    "cut_cross_entropy": {"fused"},
    "datasets": {"rows", "evaluation.metrics", "api"},
    "sympy": {"verifiers.*"},
    "math_verify": {"verifiers.*"},
    "lightning": {
        "checkpoint",
        "call_config",
        "last_lines",
        "stepping",
        "panel",
        "probe",
        "parallel",
        "placement",
        "strategy",
        "sft",
        "prm.train",
        "data",
        "module",
        "callbacks",
        "alarms",
        "progress",
        "sample_table",
        "evaluation.callback",
        "watch",
        "cli",
        "__main__",
    },
    "torch": {"*", "!verifiers.*", "!report.*", "!rollout", "!tally", "!prompts", "!rows", "!template"},
    "transformers": {"*", "!verifiers.*", "!algorithms.*", "!rollout", "!batch", "!rows"},
}


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
                room = PACKAGE.parent / full.replace(".", "/")
                yield full if room.with_suffix(".py").is_file() or room.is_dir() else node.module


def matches(name, pattern):
    return pattern in ("*", name) or (pattern.endswith(".*") and name.split(".")[0] == pattern[:-2])


def floor(name):
    exact = [i for i, names in enumerate(FLOORS) if name in names]
    family = [i for i, names in enumerate(FLOORS) if any(matches(name, n) for n in names if n.endswith(".*"))]
    return (exact or family or [None])[0]


GRAPH = {name: set(imports(tree)) for name, tree in modules()}
OWN = {
    name: {i.removeprefix("prime_lightning.") for i in found if i.removeprefix("prime_lightning.") in GRAPH}
    for name, found in GRAPH.items()
}


@pytest.mark.parametrize("name", GRAPH)
def test_imports_go_downwards(name):
    top = name.split(".")[0]
    if top == "verifiers" and name != "verifiers":  # its rooms are its own, but it knows only the nouns outside
        nouns = {"rollout", "usage"} if name == "verifiers.command" else {"rollout"}
        assert all(i in nouns or i.split(".")[0] == "verifiers" for i in OWN[name])
        return
    assert floor(name) is not None, f"{name} stands on no floor; add it to FLOORS and CONTRIBUTING.md"
    for other in OWN[name]:
        inside = other.split(".")[0] == top != other and top in ("engines", "verifiers")
        below = other.startswith("verifiers") or (floor(other) is not None and floor(other) < floor(name))
        assert below or inside, f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"


def test_no_import_cycle():
    inner = {name: {other for other in found if other != name} for name, found in OWN.items()}
    TopologicalSorter(inner).prepare()  # raises on a cycle


@pytest.mark.parametrize("guest", DOORS)
def test_guests_use_their_doors(guest):
    for name, found in GRAPH.items():
        if any(i == guest or i.startswith(f"{guest}.") for i in found):
            doors = DOORS[guest]
            assert not any(matches(name, d[1:]) for d in doors if d.startswith("!")), f"{name}: {guest}"
            assert any(matches(name, d) for d in doors if not d.startswith("!")), f"{name}: {guest}"


def test_every_file_is_short_and_says_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        assert ast.get_docstring(ast.parse(text)), path
