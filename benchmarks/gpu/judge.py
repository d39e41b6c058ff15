"""What a good result looks like: checks on what was measured, each with its bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

PEAK_TFLOPS = {  # dense bfloat16, from the vendor's data sheets; the first name that is part of the card's counts
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX A6000": 155.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
TRAINING = ("prm", "policy")
MFU, MEMORY, FREED = 0.35, 0.15, 0.5
GAP = {"bfloat16": 0.05, "float32": 1e-3}
REGRET = {"bfloat16": 0.1, "float32": 1e-3}
SAME = 1e-3
COMPARED = ("prm/loss", "prm/grad_norm", "policy/loss", "policy/grad_norm", "policy/entropy", "rollout/length")


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    value: Any
    good: str
    passed: bool | None
    """None where this machine cannot tell."""


def peak_of(card: str | None) -> float | None:
    """Operations a second of a card by its name; None for one that is not known."""
    return next((1e12 * tflops for name, tflops in PEAK_TFLOPS.items() if card and name in card), None)


def checks_of_training(found: dict[str, Any], *, dtype: str, cuda: bool, peak: float | None) -> list[dict[str, Any]]:
    """All checks of a run with an engine beside the trainer.

    Args:
        found: What `runs.fit` measured.
        dtype: Of the engine.
        cuda: Whether there is GPU memory to look at.
        peak: Operations a second of the card.
    """
    checks = [*of_engine(found, dtype), *of_time(found, peak if cuda else None)]
    if cuda:
        checks += [of_sleep(found), *of_memory(found)]
    return [asdict(check) for check in checks]


def of_engine(found: dict[str, Any], dtype: str) -> Iterator[Check]:
    """Whether the engine samples from the trainer's policy, before and after weights were sent."""
    engine = found["engine"]
    done, wanted = engine["version"], engine["iterations"]
    yield Check(f"weights sent and read back ({engine['transfer']})", done, f"version {wanted}", done == wanted)
    gap = found["iterations"][0]["importance/abs_diff"]
    yield Check("first batch, log-prob gap (nats a token)", gap, f"<= {GAP[dtype]}", gap <= GAP[dtype])
    last = found["iterations"][-1]["importance/abs_diff"]
    yield Check("last batch, log-prob gap (nats a token)", last, f"<= {GAP[dtype]}", last <= GAP[dtype])
    yield from of_greedy(found["greedy"], dtype)


def of_greedy(greedy: dict[str, float], dtype: str) -> Iterator[Check]:
    """Whether the engine's greedy tokens are the trainer's likeliest, after the last weights were sent."""
    exact = greedy["equal"] == 1 if dtype == "float32" else None  # bfloat16 has ties
    yield Check("greedy tokens, equal", greedy["equal"], "1, less by ties in bfloat16", exact)
    regret = greedy["regret"]
    yield Check("greedy tokens, greatest regret (nats)", regret, f"<= {REGRET[dtype]}", regret <= REGRET[dtype])


def of_time(found: dict[str, Any], peak: float | None) -> Iterator[Check]:
    """The last iteration by phase, and the share of the card's arithmetic that training reaches."""
    seconds = phases(found["iterations"][-1])
    yield Check("iteration (s)", sum(seconds.values()), words(seconds), all(seconds.get(p, 0) > 0 for p in TRAINING))
    if peak is None:
        yield Check("MFU of the training phases", None, f">= {MFU}; give --peak-tflops", None)
        return
    forward = found["forward_flops"]
    mfu = 3 * forward * len(TRAINING) / sum(seconds[phase] for phase in TRAINING) / peak
    yield Check("MFU of the training phases (6 N a token)", mfu, f">= {MFU}", mfu >= MFU)
    scoring = 3 * forward / seconds["score"] / peak  # policy, reference and PRM
    yield Check("MFU of scoring (2 N a token)", scoring, "information", None)


def of_sleep(found: dict[str, Any]) -> Check:
    """Whether a sleeping engine leaves its memory to the trainer."""
    freed, total = min(found["freed_bytes"]), found["total_bytes"]
    share = freed / (total * found["engine_share"])
    return Check("sleep frees, share of the engine's memory", share, f">= {FREED}", share >= FREED)


def of_memory(found: dict[str, Any]) -> Iterator[Check]:
    """Peaks of the trainer's own tensors against the plan."""
    for phase in TRAINING:
        ratio = found["peak_bytes"][phase] / found["planned_bytes"]
        good = f"{1 - MEMORY:.2f} to {1 + MEMORY:.2f}"
        yield Check(f"peak memory in {phase}, over the plan's", ratio, good, abs(ratio - 1) <= MEMORY)


def checks_of_strategy(found: dict[str, Any], plain: dict[str, Any]) -> list[dict[str, Any]]:
    """The first iteration against the same one without a strategy, and the engine's weights after it."""
    checks = [of_number(name, found["iterations"][0], plain["iterations"][0]) for name in COMPARED]
    gap = found["iterations"][-1]["importance/abs_diff"]
    checks.append(Check("last batch, log-prob gap (nats a token)", gap, f"<= {GAP['float32']}", gap <= GAP["float32"]))
    checks += of_greedy(found["greedy"], "float32")
    return [asdict(check) for check in checks]


def of_number(name: str, row: dict[str, float], plain: dict[str, float]) -> Check:
    """Two values of a metric, relative to the plain one or to 0.001 where that is smaller."""
    difference = abs(row[name] - plain[name]) / max(abs(plain[name]), 1e-3)
    return Check(f"{name}, relative to plain", difference, f"<= {SAME}", difference <= SAME)


def phases(row: dict[str, float]) -> dict[str, float]:
    """Seconds by phase."""
    return {name.removeprefix("time/"): value for name, value in row.items() if name.startswith("time/")}


def words(seconds: dict[str, float]) -> str:
    """Phases in one line."""
    return ", ".join(f"{phase} {value:.2f}" for phase, value in seconds.items())
