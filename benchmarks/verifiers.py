"""How fast the verifiers are, and by how much a hostile answer exceeds its limit: a table, and JSON with `--json FILE`.

    python benchmarks/verifiers.py [--workers 2] [--tier auto] [--json FILE] [--data FOLDER]

CPU-ms per item (this process and all workers together) is the stable figure; wall figures need an idle machine.
`--data` is a folder with `mbpp.jsonl`; without it, programs of this file stand in.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prime_lightning.rollout import Prompt
from prime_lightning.verifiers import CodeOptions, MathOptions, Verifiers
from prime_lightning.verifiers.code.run import Runner
from prime_lightning.verifiers.workers.launch import ZygoteSpec, machine_tiers

Pair = tuple[Prompt, str]
HOSTILE = {
    "tower": "9^{9^{9^{9}}}", "factorial": "99999999!", "nested factorials": "((7!)!)!", "stars": "10**10**10",
    "binomial": r"\binom{10^9}{5\cdot10^8}", "parentheses": "(" * 25 + "1" + ")" * 25,
    "sum": r"\sum_{k=1}^{10^9} \frac{1}{k^2}",
    "fractions": r"\frac{1}{" * 40 + "2" + "}" * 40, "10,000 deep": "{" * 10_000 + "1" + "}" * 10_000,
    "100 kB of digits": "7" * 100_000,
    "100 kB of sums": "x+" * 50_000 + "x", "power": "(a+b+c+d+e)^{200}", "integral": r"\int_0^1 \sin(x^{x^x})dx",
}  # fmt: skip


def prompt(kind: str, answer: str = "", row: dict[str, Any] | None = None) -> Prompt:
    return Prompt(draw=0, token_ids=(), text="", kind=kind, answer=answer, source=kind, row=row or {})


def cpu_seconds() -> float:
    """CPU time of this process and of all workers, alive or ended."""
    total = time.process_time()
    tick = os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if b"boot.py" in (stat.parent / "cmdline").read_bytes():
                total += sum(map(int, stat.read_text().rsplit(")", 1)[1].split()[11:15])) / tick
        except OSError:
            continue
    return total


def rate(verifiers: Verifiers, pairs: Iterable[Pair], warm: Iterable[Pair], correct: float) -> dict[str, float]:
    """Items a second and CPU-ms an item; refuses to report a speed of wrong verdicts."""
    for _ in verifiers.map(warm):
        pass
    pairs = list(pairs)
    gc.collect()
    cpu, begun = cpu_seconds(), time.perf_counter()
    verdicts = list(verifiers.map(pairs))
    wall, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
    share = sum(verdict.score == 1.0 for verdict in verdicts) / len(verdicts)
    assert abs(share - correct) < 0.02, f"{share} of the verdicts are correct, not {correct}"
    return {"items": len(pairs), "per_second": len(pairs) / wall, "cpu_ms": 1000 * cpu / len(pairs)}


def programs(data: Path | None) -> list[Pair]:
    """MBPP references with three asserts each, or functions of our own of about that size."""
    if data is not None:
        rows = [json.loads(line) for line in (data / "mbpp.jsonl").open()]
        return [(prompt("code", row=row), row["reference_solution"]) for row in rows if row["id"] != "mbpp/123"]
    source = (
        "def f(xs):\n    best = xs[0]\n    for x in xs:\n        best = max(best, x + {n})\n    return best - {n}\n"
    )
    tests = ["assert f([1, 2, 3]) == 3", "assert f([5, -5]) == 5", "assert f([0]) == 0"]
    return [(prompt("code", row={"tests": tests}), source.format(n=n)) for n in range(900)]


def code(options: CodeOptions, workers: int, data: Path | None) -> dict[str, Any]:
    """Throughput of the three modes, and the start of one worker."""
    starts = []
    for _ in range(5):
        begun = time.perf_counter()
        runner = Runner(
            machine_tiers()[0] if options.tier == "auto" else options.tier, options, ZygoteSpec(module="programs")
        )
        starts.append(time.perf_counter() - begun)
        runner.close()
    calls = programs(data)
    stdio = prompt("code", row={"tests": [{"stdin": "3\n1 2 3\n", "stdout": "6\n"}]})
    reads = "n = int(input())\nprint(sum(map(int, input().split())))\n"
    script = prompt("code", row={"tests": ["x = f(3)\nassert x == 4", "assert f(1) > 1", "assert f(5) in (6, 7)"]})
    with Verifiers(workers=workers, code=options) as verifiers:
        results: dict[str, Any] = {"worker start": {"seconds": sorted(starts)[2]}}
        results["calls mode"] = rate(verifiers, calls, calls, 1.0)
        results["stdio case"] = rate(verifiers, [(stdio, reads)] * 1000, [(stdio, reads)] * 50, 1.0)
        plus = "def f(x):\n    return x + 1\n"
        results["script mode"] = rate(verifiers, [(script, plus)] * 500, [(script, plus)] * 50, 1.0)
    return results


def hard(number: int) -> tuple[str, str]:
    """A pair that no string work decides; different for every number."""
    n = number + 2
    forms = (
        (rf"\sqrt{{{2 * n * n}}}", rf"{n}\sqrt{{2}}"), (f"(x+{n})^2", f"x^2+{2 * n}x+{n * n}"),
        (rf"\frac{{{n}\pi}}{{4}}", rf"{n}\cdot\frac{{\pi}}{{4}}"),
        (rf"(-\infty,{n}]", rf"x\le {n}"), (rf"\log_2 {2 ** (n % 40 + 2)}", str(n % 40 + 2)),
        (rf"(\sqrt{{{n}}},{n})", rf"({n}^{{1/2}},{n})"), (rf"\frac{{x+{n}}}{{x}}", rf"1+\frac{{{n}}}{{x}}"),
        (f"y={n}x+1", f"1+{n}x"),
        (rf"{n}+{n}i", rf"{n}i+{n}"), (rf"{n}e^{{2}}", rf"e^{{2}}\cdot {n}"),
    )  # fmt: skip
    return forms[number % len(forms)]


def mix(prompts: int, rollouts: int) -> list[Pair]:
    """What a training run asks: 60 % integers, 15 % fractions, 7 % letters, 18 % expressions; a third of all wrong."""
    rng = random.Random(0)
    pairs = []
    for number in range(prompts):
        draw = rng.random()
        reference, right = hard(rng.randrange(1000))
        wrong = [f"{right}+{k}" for k in (1, 2)]
        if draw < 0.6:
            reference = right = str(rng.randrange(10_000))
            wrong = [str(int(right) + k) for k in (1, 10)]
        elif draw < 0.75:
            top, bottom = rng.randrange(1, 50), rng.randrange(2, 50)
            reference, right, wrong = (
                rf"\frac{{{top}}}{{{bottom}}}",
                f"{top}/{bottom}",
                [f"{top + 1}/{bottom}", f"{top}/{bottom + 1}"],
            )
        elif draw < 0.82:
            reference, right, wrong = "B", r"\text{(B)}", ["A", "C"]
        thought = f"Let us see, question {number}. " + "We add the two sides and simplify the terms. " * 60
        for _ in range(rollouts):
            answer = right if rng.random() < 2 / 3 else rng.choice(wrong)
            pairs.append((prompt("math", reference), rf"{thought}The answer is $\boxed{{{answer}}}$."))
    return pairs


def maths(options: MathOptions, workers: int) -> dict[str, Any]:
    """Throughput of the realistic mix and of hard pairs, and the excess of hostile answers over their limit."""
    results: dict[str, Any] = {}
    with Verifiers(workers=workers, math=options) as verifiers:
        begun = time.perf_counter()
        verifiers.verify(prompt("math", "x^2"), r"\boxed{x\cdot x}")
        results["maths start"] = {"seconds": time.perf_counter() - begun}
        warm = [(prompt("math", hard(n)[0]), rf"\boxed{{{hard(n)[1]}}}") for n in range(2000, 2100)]
        pairs = mix(150, 16)
        wanted = 0.66
        results["maths, realistic mix"] = rate(verifiers, pairs, warm, wanted)
        unique = [(prompt("math", hard(n)[0]), rf"\boxed{{{hard(n)[1]}}}") for n in range(3000, 3600)]
        results["maths, all hard"] = rate(verifiers, unique, [], 1.0)
        easy = [(prompt("math", str(n)), rf"so \boxed{{{n}}}") for n in range(20_000)]
        results["maths, integers"] = rate(verifiers, easy, [], 1.0)
        excess = {}
        for name, answer in HOSTILE.items():
            begun = time.perf_counter()
            verdict = verifiers.verify(prompt("math", "12"), rf"\boxed{{{answer}}}")
            assert verdict.score == 0.0, name
            excess[name] = time.perf_counter() - begun - options.seconds
        results["hostile maths"] = {"worst_excess_seconds": max(excess.values()), "limit_seconds": options.seconds}
    return results


def code_limit(options: CodeOptions, workers: int) -> dict[str, Any]:
    """How long after its CPU limit an endless program is judged."""
    endless = prompt("code", row={"tests": ["assert f() == 1"]})
    with Verifiers(workers=workers, code=options) as verifiers:
        verifiers.verify(endless, "def f(): return 1")
        begun = time.perf_counter()
        verdict = verifiers.verify(endless, "def f():\n    while True: pass\n")
        assert verdict.reason == "time-out"
        return {"endless program": {"worst_excess_seconds": time.perf_counter() - begun - options.cpu_seconds}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tier", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    sections: list[Callable[[], dict[str, Any]]] = [lambda: maths(MathOptions(), arguments.workers)]
    with tempfile.TemporaryDirectory() as folder:
        options = CodeOptions(tier=arguments.tier, cache_folder=folder)
        if machine_tiers():
            sections += [
                lambda: code(options, arguments.workers, arguments.data),
                lambda: code_limit(options, arguments.workers),
            ]
        results = {name: figures for section in sections for name, figures in section().items()}
    about = {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "workers": arguments.workers,
    }
    table = Table(
        "what",
        "per second",
        "CPU-ms",
        "seconds",
        title=f"Verifiers, {arguments.workers} workers, load {about['load']:.1f}",
    )
    for name, figures in results.items():
        seconds = figures.get("seconds", figures.get("worst_excess_seconds"))
        cells = (figures.get("per_second"), figures.get("cpu_ms"), seconds)
        table.add_row(
            name, *("" if cell is None else f"{cell:,.3g}" if cell < 100 else f"{cell:,.0f}" for cell in cells)
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
