"""Runs to one HTML file, and the credit view on its own for notebooks.

The page is `assets/*`: a Jinja template, styles and scripts, put together without a build step. All data is a block of
JSON, escaped so that no text in it can end the block; the scripts write text by `textContent` only, and the page's
Content-Security-Policy lets nothing run but these very scripts, by their hashes, and nothing reach the network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from prime_lightning.report import panels
from prime_lightning.report.rollouts import LONGEST, sample_rollouts
from prime_lightning.report.runs import Run, differences, read_run
from prime_lightning.rollout.files import replace_text

ROLLOUT_BYTES = 4_000_000
"""Of `rollouts.jsonl` that go into a page, all runs together; on the page they are smaller."""
CELLS = 200_000
"""Numbers in the curves of a page; longer runs are thinned."""
SPENT = {"rollouts": "rollout/responses", "tokens": "rollout/tokens"}
"""Axes that add a metric up."""


def write_report(folders: Sequence[str | Path], out: str | Path, *, reload: int | None = None) -> Path:
    """Write runs as one self-contained HTML file, all at once: a reader never sees half of it.

    Args:
        folders: Run folders.
        out: The file.
        reload: Seconds after which the page loads itself again; None for a page that stays.

    Raises:
        OSError: if a folder or the file's folder is not there.
        ValueError: if a folder is no run, or there is none.
    """
    out = Path(out)
    replace_text(out, render(payload([read_run(folder) for folder in folders]), plots=True, reload=reload))
    return out


def credit_view(*folders: str | Path, height: int = 720) -> CreditView:
    """The credit view of runs, for the last line of a notebook's cell.

    Raises:
        OSError: if a folder is not there.
        ValueError: if a folder is no run, or none has rollouts.

    Example:
        >>> credit_view("runs/quickstart")  # doctest: +SKIP
    """
    data = payload([read_run(folder) for folder in folders])
    if not data["credit"]:
        raise ValueError(
            f"Expected a rollouts.jsonl with rollouts in it, as the callback RolloutLog writes; {data['notes']}"
        )
    return CreditView(render({**data, "sections": [], "benchmarks": []}, plots=False), height)


@dataclass(frozen=True)
class CreditView:
    """A page in a frame of its own: its styles and scripts do not touch the notebook, nor the notebook's them."""

    page: str
    height: int = 720

    def _repr_html_(self) -> str:
        source = html.escape(self.page, quote=True)
        return (
            f'<iframe title="PRIME credit view" sandbox="allow-scripts" srcdoc="{source}" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )


def payload(runs: list[Run]) -> dict[str, Any]:
    """Everything that the page shows, as JSON values.

    Raises:
        ValueError: if there are no runs.
    """
    if not runs:
        raise ValueError("Expected at least one run folder, got none.")
    names = sorted({name for run in runs for row in run.rows.values() for name in row})
    measured = {row["benchmark"] for run in runs for row in run.benchmarks}  # these have a section of their own
    titles = _titles(runs)
    notes = [f"{title}: {note}" for title, run in zip(titles, runs, strict=True) for note in run.notes]
    cells = sum(len(run.rows) for run in runs) * len(names)
    stride = -(-cells // CELLS) or 1
    if stride > 1:
        notes.append(f"Curves show every {stride}th iteration, to keep the page small.")
    credit = [_credit(i, run, titles[i], ROLLOUT_BYTES // len(runs), notes) for i, run in enumerate(runs)]
    return {
        "runs": [
            _curves(run, names, stride) | {"name": title, "differs": differs}
            for run, title, differs in zip(runs, titles, differences(runs), strict=True)
        ],
        "groups": _seeds(runs, titles),
        "sections": panels.sections([name for name in names if name.split("/")[0] not in measured]),
        "phases": panels.phases(names),
        "benchmarks": [row | {"run": i} for i, run in enumerate(runs) for row in run.benchmarks],
        "credit": [found for found in credit if found],
        "notes": notes,
    }


def render(data: dict[str, Any], *, plots: bool, reload: int | None = None) -> str:
    """The page. Without plots it is the credit view alone."""
    scripts = [
        *([get_plotlyjs()] if plots else []),
        *map(_text, ["common.js", "credit.js", *(["plots.js"] if plots else [])]),
    ]
    scripts = [script.replace("\r\n", "\n") for script in scripts]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return _template().render(
        css=_text("page.css"), scripts=scripts, hashes=hashes, data=embedded(data), plots=plots, reload=reload
    )


def embedded(data: Any) -> str:
    r"""JSON in ASCII that can stand in a script element: no `<`, `>` or `&`, no line separators, no lone surrogates.

    Example:
        >>> embedded({"text": "</script>\u2028\ud800"})
        '{"text":"\\u003c/script\\u003e\\u2028\\ud800"}'
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _text(name: str) -> str:
    return resources.files("prime_lightning.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_text("page.html"))


def _titles(runs: list[Run]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        titles = ["/".join(p[-depth:]) for p in parts]
        if len(set(titles)) == len(titles):
            return titles
    return [f"{title} ({i + 1})" for i, title in enumerate(titles)]  # the same folder twice


def _seeds(runs: list[Run], titles: list[str]) -> list[dict[str, Any]]:
    """Runs with one configuration are seeds of it; a run without a configuration is on its own."""
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        key = json.dumps(run.settings, sort_keys=True, default=str) if run.settings else f"run {i}"
        groups.setdefault(key, []).append(i)
    return [
        {
            "name": titles[found[0]] if len(found) == 1 else f"{_without_seed(titles[found[0]])} ({len(found)} seeds)",
            "runs": found,
        }
        for found in groups.values()
    ]


def _without_seed(title: str) -> str:
    """A run's name for all its seeds: `prime-seed0` to `prime`."""
    return re.sub(r"[-_/ ]*(seed|s)?[-_ ]*\d+$", "", title) or title


def _curves(run: Run, names: list[str], stride: int) -> dict[str, Any]:
    """Metrics by iteration, and what was spent before each: the policy of iteration n has seen what came before n."""
    spent = dict.fromkeys(("rollouts", "tokens", "seconds"), 0.0)
    axes: dict[str, list[float]] = {name: [] for name in spent}
    for row in run.rows.values():
        for axis, total in spent.items():
            axes[axis].append(round(total, 1))
        for axis, name in SPENT.items():
            spent[axis] += row.get(name, 0.0)
        spent["seconds"] += sum(value for name, value in row.items() if name.startswith("time/"))
    steps = list(run.rows)
    keep = [i for i in range(len(steps)) if i % stride == 0 or i == len(steps) - 1 or "val/pass1" in run.rows[steps[i]]]
    trained = [step for step, row in run.rows.items() if SPENT["rollouts"] in row]
    columns = {name: [_digits(run.rows[steps[i]].get(name)) for i in keep] for name in names}
    return {
        "iterations": max(trained or steps, default=-1) + 1,
        "steps": [steps[i] for i in keep],
        "spent": {axis: round(total, 1) for axis, total in spent.items()},
        "axes": {name: [values[i] for i in keep] for name, values in axes.items()},
        "metrics": {name: values for name, values in columns.items() if any(v is not None for v in values)},
        "seed": run.seed if isinstance(run.seed, int) else None,
        "summary": {
            k: v for k, v in run.summary.items() if isinstance(v, int | float) and not isinstance(v, bool) and v == v
        },
    }


def _digits(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.5g}")


def _credit(i: int, run: Run, title: str, budget: int, notes: list[str]) -> dict[str, Any] | None:
    """The rollouts of a run that fit, with a note on those that do not."""
    if not run.rollouts.is_file():
        notes.append(
            f"{title}: no rollouts.jsonl, so no credit view: "
            "add prime_lightning.training.callbacks.RolloutLog to the callbacks."
        )
        return None
    sampled = sample_rollouts(run.rollouts, budget)
    if sampled.broken:
        notes.append(f"{title}: {sampled.broken} lines of rollouts.jsonl could not be read and are left out.")
    if sampled.kept < sampled.total:
        notes.append(
            f"{title}: the credit view shows {sampled.kept:,} of {sampled.total:,} logged rollouts: whole groups, "
            "spread evenly over the iterations."
        )
    if sampled.cut:
        notes.append(f"{title}: {sampled.cut} responses are cut after {LONGEST} tokens.")
    if not sampled.groups:
        notes.append(f"{title}: rollouts.jsonl has no rollouts (yet).")
        return None
    return {"run": i, "groups": sampled.groups}
