"""The first run on a new machine with one GPU: does everything work together here, and is it as fast as it should be?

    python benchmarks/gpu/first_run.py --out results.json             one GPU, with vLLM
    python benchmarks/gpu/first_run.py --device cpu --tiny            what a CPU can tell: tiny models, the hf engine
    python benchmarks/gpu/first_run.py --parts machine qwen           some parts only

Each part runs in a process of its own and is reported even if another one fails. docs/gpu.md says what each line means.
Exit status: 0 if every check passed, 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import judge

Part = dict[str, Any]
LIMITS = {"machine": 120, "qwen": 540, "plain": 150, "zero3": 180, "fsdp2": 180, "smollm": 270}
"""Parts in their order, and the seconds that each may take; less than 25 minutes together."""
CPU_LIMIT = 600
TAIL = 4000  # characters of a failed part's output


def main(args: Sequence[str] | None = None) -> int:
    options = parser().parse_args(args)
    found: dict[str, Any] = {"options": vars(options), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found["parts"][name] = in_child(name, Path(folder), options)
            if options.out:
                Path(options.out).write_text(json.dumps(found, indent=2) + "\n")
    print(table(found["parts"]))
    return int(not all(passed(part) for part in found["parts"].values()))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    made.add_argument("--tiny", action="store_true", help="tiny models and few tokens, to see that it works")
    made.add_argument("--parts", nargs="+", default=[*LIMITS], choices=[*LIMITS])
    made.add_argument("--peak-tflops", type=float, help="dense bfloat16, of a card that judge.py does not know")
    made.add_argument("--out", help="JSON file, written again after each part")
    return made


# ---- each part in a process


def in_child(name: str, folder: Path, options: argparse.Namespace) -> Part:
    """Run a part; what it found, or how it failed."""
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    words = [sys.executable, __file__, "part", name, str(folder), json.dumps(vars(options))]
    limit = CPU_LIMIT if options.device == "cpu" else LIMITS[name]
    started = time.perf_counter()
    with log.open("w") as lines:
        status = ended(subprocess.Popen(words, stdout=lines, stderr=lines, start_new_session=True), limit)
    found = json.loads(out.read_text()) if out.exists() else {"error": f"ended with {status}", "checks": []}
    if "error" in found:
        found["log"] = log.read_text(errors="replace")[-TAIL:]
    return found | {"seconds": time.perf_counter() - started}


def ended(process: subprocess.Popen[bytes], limit: float) -> str:
    """Wait for a process, and end whatever it leaves: an engine would keep its share of the card."""
    try:
        return f"status {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        return f"nothing after {limit} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def child(name: str, folder: Path, options: argparse.Namespace) -> None:
    """The other end of `in_child`."""
    try:
        found = PARTS[name](folder, options)
    except Exception as error:  # whatever it is, it is this part's result
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0], "checks": []}
    (folder / f"{name}.json").write_text(json.dumps(found))
    sys.stdout.flush()


# ---- the parts


def machine(folder: Path, options: argparse.Namespace) -> Part:
    """Versions, driver and card."""
    import torch

    from prime_lightning.__main__ import versions

    found: Part = {"versions": versions().splitlines(), "cores": os.cpu_count(), "card": None}
    if options.device == "cpu":
        return found | {"checks": [asdict(judge.Check("torch runs", float(torch.ones(2).sum()), "2", True))]}
    card = torch.cuda.get_device_properties(0)
    found |= {"card": card.name, "cuda": torch.version.cuda, "gib": card.total_memory / 2**30}
    found["capability"] = list(torch.cuda.get_device_capability(0))
    bfloat16 = found["capability"] >= [8, 0]
    known = judge.peak_of(card.name) or options.peak_tflops
    checks = [
        judge.Check("card", f"{card.name}, {found['gib']:.0f} GiB", "24 GiB or more", found["gib"] >= 22),
        judge.Check("computes in bfloat16", found["capability"], ">= [8, 0]", bfloat16),
        judge.Check("its peak is known", known, "a number", True if known else None),
    ]
    return found | {"checks": [asdict(check) for check in checks]}


def training(name: str) -> Callable[[Path, argparse.Namespace], Part]:
    """A part that trains a model of this name with the engine beside the trainer."""

    def part(folder: Path, options: argparse.Namespace) -> Part:
        import models
        import runs
        import torch

        cuda, place = options.device == "cuda", folder / name
        model = models.write_model(place / "model", name, tiny=options.tiny)
        size = {"prompts": 4, "tokens": 9} if options.tiny else {"prompts": 64, "tokens": 1001}
        layers = ["strategy/one_gpu.yaml", "engine/vllm.yaml"] if cuda else ["strategy/cpu.yaml"]
        shared = runs.settings(model, **size, iterations=2 if options.tiny else 4)
        found = runs.fit(place, layers, [shared, engine(cuda)])
        card = None
        if cuda:
            card = torch.cuda.get_device_properties(0)
            found["total_bytes"] = card.total_memory
        peak = options.peak_tflops * 1e12 if options.peak_tflops else judge.peak_of(card and card.name)
        dtype = "bfloat16" if cuda else "float32"
        return found | {"checks": judge.checks_of_training(found, dtype=dtype, cuda=cuda, peak=peak)}

    return part


def engine(cuda: bool) -> dict[str, Any]:
    """vLLM in bfloat16 on the trainer's card, weights by `ipc`; or, on a CPU, both in float32 in one process."""
    if cuda:
        return {"data": {"engine": {"init_args": {"device": "cuda", "dtype": "bfloat16", "transfer": "ipc"}}}}
    return {"trainer": {"precision": "32-true"}, "data": {"engine": {"init_args": {"dtype": "float32"}}}}


def strategy(name: str, layer: str) -> Callable[[Path, argparse.Namespace], Part]:
    """A part that trains a SmolLM2-135M-shaped model in float32, in one process, and compares with the plain run."""

    def part(folder: Path, options: argparse.Namespace) -> Part:
        import models
        import runs

        place, cuda = folder / name, options.device == "cuda"
        model = models.write_model(place / "model", "smollm", tiny=options.tiny)
        shared = runs.settings(model, prompts=4 if options.tiny else 8, tokens=9 if options.tiny else 64, iterations=2)
        exact = {
            "trainer": {"precision": "32-true", "accelerator": "gpu" if cuda else "cpu"},
            "model": {"loading": {"attention": "sdpa", "packed": False, "gradient_checkpointing": False}},
            "data": {"engine": {"init_args": {"dtype": "float32"}}},
        }
        found = runs.fit(place, [layer], [shared, exact])
        return found | {"checks": judge.checks_of_strategy(found, found if name == "plain" else plain_of(folder))}

    return part


def plain_of(folder: Path) -> Part:
    """What the part `plain` found, earlier in the same run."""
    file = folder / "plain.json"
    plain: Part = json.loads(file.read_text()) if file.exists() else {}
    if "iterations" not in plain:
        raise ValueError("Expected a part `plain` that went well before this one, to compare with, got none.")
    return plain


PARTS: dict[str, Callable[[Path, argparse.Namespace], Part]] = {
    "machine": machine,
    "qwen": training("qwen"),
    "plain": strategy("plain", "strategy/one_gpu.yaml"),
    "zero3": strategy("zero3", "strategy/zero3.yaml"),
    "fsdp2": strategy("fsdp2", "strategy/fsdp2.yaml"),
    "smollm": training("smollm"),
}


# ---- for the reader


def passed(part: Part) -> bool:
    """Whether a part ended, and none of its checks failed."""
    return "error" not in part and all(check["passed"] is not False for check in part["checks"])


def table(parts: dict[str, Part]) -> str:
    """A line for each check."""
    lines = []
    for name, part in parts.items():
        lines.append(f"{name} ({part['seconds']:.0f} s): {'passed' if passed(part) else 'FAILED'}")
        lines += [f"  versions: {line}" for line in part.get("versions", [])]
        lines += [line(**check) for check in part["checks"]]
        if "error" in part:
            lines += [f"  {part['error']}", *(f"  | {line}" for line in part["log"].splitlines()[-15:])]
    return "\n".join(lines)


def line(what: str, value: Any, good: str, passed: bool | None) -> str:
    """One check."""
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    mark = {True: "pass", False: "FAIL", None: "-"}[passed]
    return f"  {mark:<5} {what:<46} {shown:<12} good: {good}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        child(sys.argv[2], Path(sys.argv[3]), argparse.Namespace(**json.loads(sys.argv[4])))
    else:
        sys.exit(main())
