"""What the runs of `benchmarks/training.py` come to: medians, ratios, and tables in Markdown."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PHASES = ("iteration", "sample", "verify", "sync", "training", "score", "prm", "policy")
RATIOS = (  # what is divided, of which arm, by which arm's
    ("iteration", "trl", "rloo"),
    ("iteration", "trl", "rloo_packed"),
    ("training", "trl", "rloo"),
    ("training", "trl", "rloo_packed"),
    ("training", "rloo", "floor_rloo"),
    ("training", "rloo_packed", "floor_rloo"),
    ("training", "prime", "floor_prime"),
    ("training", "prime_packed", "floor_prime"),
    ("training", "prime", "rloo"),
    ("training", "prime_packed", "rloo_packed"),
    ("peak_gib", "rloo", "trl"),
)


def medians(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over turns; passes and tokens are those of the last one."""
    seconds = {name: statistics.median(turn["seconds"][name] for turn in turns) for name in turns[0]["seconds"]}
    peak = statistics.median(turn["peak_gib"] for turn in turns)
    return {"seconds": seconds, "peak_gib": peak, **{name: turns[-1].get(name) for name in ("passes", "answer_tokens")}}


def ratios(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Each pair of arms that ran, turn by turn."""
    found = {}
    for what, above, below in RATIOS:
        if above in runs and below in runs:
            pairs = zip(runs[above], runs[below], strict=True)
            found[f"{what}: {above} / {below}"] = statistics.median(
                (a | a["seconds"])[what] / (b | b["seconds"])[what] for a, b in pairs
            )
    return found


def versions(measured: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of what was measured; the peer says its own."""
    names = ("prime_lightning", "torch", "transformers", "lightning")
    mine = {"python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        mine |= {name: importlib.metadata.version(name) for name in names}
    runs = measured[-1]["runs"]
    peer = runs["trl"][-1]["versions"] if runs.get("trl") else {}
    return mine | {f"peer's {name}" if name in mine else name: version for name, version in peer.items()}


def machine() -> str:
    """The processor, how many of its cores there are, and the memory."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{name}, {os.cpu_count()} cores, {gib:.0f} GiB"


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """A file of results from what several runs wrote."""
    head = (
        "# Training\n\nSeconds of an iteration by phase, padded and packed, beside the same passes by hand (`floor`) "
        "and TRL's RLOOTrainer; `benchmarks/training.py` says what each arm does.\nRLOO has neither PRM nor reference, "
        "PRIME has both. Written by `python benchmarks/training.py --markdown`.\n"
    )
    return head + "".join(f"\n## {title(one)}\n\n{table(one)}\n" for one in found)


def title(found: Mapping[str, Any]) -> str:
    options = found["settings"][0]["options"]
    varied = f", by {found['vary']}" if found["vary"] else ""
    return f"`{options['model']}`, {options['shape']}, {options['precision']}{varied}"


def table(found: Mapping[str, Any]) -> str:
    """One run: its tables, and below them versions, machine, load and command."""
    body = growth(found) if found["vary"] else once(found["settings"][0])
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = ", ".join(f"{one['load'][0]:.1f}" for one in found["settings"])
    threads = found["settings"][0]["options"]["threads"]
    tail = f"{found['machine']}, {threads} threads, load averages {load}; {named}."
    return "\n".join([*body, "", tail, "", f"    {found['command']}"])


def said(options: Mapping[str, Any], varied: str | None = None) -> str:
    """What was measured, in words."""
    words = {
        "prompt_tokens": "tokens of prompt",
        "answer_tokens": "tokens of answer",
        "rollouts": "rollouts",
        "samples": "a prompt",
    }
    told = ", ".join(f"{options[name]} {what}" for name, what in words.items() if name != varied)
    return f"{told}; medians over {options['turns']} turns of {options['iterations']} iterations, seconds."


def once(one: Mapping[str, Any]) -> list[str]:
    """Arms by phase, ratios, and the passes that were made."""
    arms = one["arms"]
    phases = sorted({name for arm in arms.values() for name in arm["seconds"]}, key=PHASES.index)
    lines = [said(one["options"]), "", f"| arm | {' | '.join(phases)} | peak GiB |", f"|---{'|---' * len(phases)}|---|"]
    for name, arm in arms.items():
        cells = [f"{arm['seconds'][phase]:.3f}" if phase in arm["seconds"] else "" for phase in phases]
        lines.append(f"| {name} | {' | '.join(cells)} | {arm['peak_gib']:.2f} |")
    lines += ["", "| ratio | median over turns |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in one["ratios"].items()]
    lines += ["", "Passes of an iteration over all rollouts:"]
    return lines + [f"{name}: {made(arm['passes'])}." for name, arm in arms.items() if arm["passes"]]


def growth(found: Mapping[str, Any]) -> list[str]:
    """Seconds of an iteration, of its training, and memory, by what varies, and in units of the first row."""
    name, all_settings = found["vary"], found["settings"]
    arms = list(all_settings[0]["arms"])
    whats = [(arm, what) for arm in arms for what in ("iteration", "training", "peak_gib")]

    def value(one: Mapping[str, Any], arm: str, what: str) -> float | None:
        measured = one["arms"][arm]
        found: float | None = (measured["seconds"] | {"peak_gib": measured["peak_gib"]}).get(what)
        return found

    lines = [said(all_settings[0]["options"], name) + " In brackets: times the first row.", ""]
    heads = [f"{arm}: {'peak GiB' if what == 'peak_gib' else what}" for arm, what in whats]
    lines += [f"| {name} | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
    for one in all_settings:
        pairs = [(value(one, *what), value(all_settings[0], *what)) for what in whats]
        cells = ["" if x is None or first is None else f"{x:.3f} ({x / first:.2f})" for x, first in pairs]
        lines.append(f"| {one['options'][name]} | {' | '.join(cells)} |")
    return lines


def made(passes: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in passes.items())
