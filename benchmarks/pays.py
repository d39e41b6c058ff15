"""Does PRIME pay? Rollouts that RLOO, GRPO and PRIME need to the same accuracy, beside an oracle's: the headroom.

    python benchmarks/pays.py tune --task A --method rloo --seeds 100 101   # every candidate of the grid, ranked
    python benchmarks/pays.py run --task A --seeds 0 1 2                    # the methods with their tuned settings
    python benchmarks/pays.py summary                                       # tables, and ratios paired by seed

All settings stand in benchmarks/pays.yaml. For each seed there is one warm start, with habits of its own, from which
all methods begin; every response that is sampled counts, rejected groups too. One cell (task, method, seed, settings)
is a line of cells.jsonl; a run that was stopped goes on with the first cell that is not there. The oracle pays for
true step errors, which only made-up tasks have.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pays_summary import rollouts_to, summary
from pays_tasks import OraclePrime, Watch

from prime_lightning.cli.commands.quickstart import config, quiet
from prime_lightning.cli.lightning_cli import PrimeCLI, lightning
from prime_lightning.prompts.arithmetic import write_model
from prime_lightning.rollout.files import append_rows, whole_rows
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.module import PrimeModule

SETTINGS = Path(__file__).with_suffix(".yaml")
HELD_OUT = 777_777


def main(args: Sequence[str]) -> None:
    options = parser().parse_args(args)
    settings, out = yaml.safe_load(Path(options.settings).read_text()), Path(options.out)
    if options.what == "summary":
        print(summary(list(whole_rows(out / "cells.jsonl")), settings["thresholds"]))
        return
    quiet()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    tuning = options.what == "tune"
    seeds = options.seeds or settings["seeds"]["tuning" if tuning else "reported"]
    file = out / ("tuning.jsonl" if tuning else "cells.jsonl")
    for task, seed, method in itertools.product(options.task, seeds, options.method or settings["methods"]):
        tuned = settings["tuned"][task][method]
        for chosen in candidates(settings["grids"][method], tuned) if tuning else [tuned]:
            key = {"task": task, "method": method, "seed": seed, "chosen": chosen}
            key["settings"] = digest(settings, task, method)
            if not any(key.items() <= cell.items() for cell in whole_rows(file)):
                append_rows(file, [key | cell(settings, out, task, method, seed, chosen)])
    cells = list(whole_rows(file))
    print(ranking(cells, settings["thresholds"]) if tuning else summary(cells, settings["thresholds"]))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=["tune", "run", "summary"])
    made.add_argument("--task", nargs="+", default=["A", "D", "lookups", "hops", "hops6"])
    made.add_argument("--method", nargs="+", help="all by default")
    made.add_argument("--seeds", type=int, nargs="+", help="those of the settings by default")
    made.add_argument("--settings", default=str(SETTINGS))
    made.add_argument("--out", default="runs/pays")
    return made


def digest(settings: Mapping[str, Any], task: str, method: str) -> str:
    """What a cell depends on besides its choices, in short; a cell of other settings is run anew."""
    given = settings["tasks"][task], settings["methods"][method], settings["problems"], settings["window"]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


def candidates(grid: Mapping[str, list[Any]], tuned: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every choice of the grid, over what is not in it."""
    for values in itertools.product(*grid.values()):
        yield dict(tuned) | dict(zip(grid, values, strict=True))


def cell(
    settings: Mapping[str, Any], out: Path, task: str, method: str, seed: int, chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Train once; what happened."""
    asked = settings["tasks"][task]
    before, warm = warm_start(settings, out, task, seed)
    folder = out / task / f"seed{seed}"
    layer = common(settings, task, seed) | {"seed_everything": seed}
    layer = merged(layer, settings["methods"][method])
    for name, value in chosen.items():
        layer = merged(layer, nested(name, value))
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(layer))
    layers = ["--config", str(config("quickstart.yaml")), "--config", str(file)]
    where = ["--trainer.default_root_dir", str(folder), "--model.policy", str(warm)]
    started = time.process_time()
    module = OraclePrime if method == "oracle" else PrimeModule
    fitted = PrimeCLI(module, RolloutDataModule, ["fit", *layers, *where])
    seconds = time.process_time() - started
    watch = next(c for c in fitted.trainer.callbacks if isinstance(c, Watch))
    (after,) = fitted.trainer.validate(fitted.model, fitted.datamodule, verbose=False)
    return {
        "curve": watch.curve,
        "step_auc": watch.step_auc,
        "tokens": watch.tokens,
        "cpu_seconds": seconds,
        "pass1_before": before,
        "pass1_after": after["val/pass1"],
        "budget": asked["budget"],
        "window": settings["window"],
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }


def common(settings: Mapping[str, Any], task: str, seed: int) -> dict[str, Any]:
    """The task as a layer of a configuration."""
    asked = settings["tasks"][task]
    watch = {"class_path": "pays_tasks.Watch", "init_args": {"budget": asked["budget"]}}
    sampling = {"max_tokens": asked["max_tokens"]}
    return {
        "trainer": {"max_steps": asked["budget"], "logger": False, "callbacks": [watch]},
        "data": {
            "train": seeded(asked["prompts"], seed=seed, table_seed=seed),
            "validation": seeded(asked["prompts"], seed=HELD_OUT, table_seed=seed),
            "validation_prompts": settings["problems"],
            "sampling": sampling,
            "validation_sampling": sampling,
        },
    }


def seeded(made: Mapping[str, Any], seed: int, table_seed: int) -> dict[str, Any]:
    """A class with its seeds; the secret table, or the teacher's habits, are another for each seed of the benchmark."""
    given = dict(made["init_args"]) | {"seed": seed}
    if "pays_tasks" in made["class_path"]:
        given["table_seed"] = table_seed
    if "teacher" in given:
        given["teacher"] = dict(given["teacher"]) | {"seed": 1234 + table_seed}
    return {"class_path": made["class_path"], "init_args": given}


def warm_start(settings: Mapping[str, Any], out: Path, task: str, seed: int) -> tuple[float, Path]:
    """pass@1 and folder of the model that all methods of a task and seed start from; made once."""
    asked, folder = settings["tasks"][task], out / task / f"seed{seed}"
    file = folder / "warm.json"
    if not file.is_file():
        write_model(folder / "init", seed=seed)
        here = ["--trainer.default_root_dir", str(folder), "--seed_everything", str(seed), "--trainer.logger", "false"]
        lessons = seeded(asked["lessons"], seed=10_000 + seed, table_seed=seed)
        given = ["--data.lessons", json.dumps(lessons)]
        lightning(["sft", "--config", str(config("quickstart_sft.yaml")), *here, *given])
        layer = folder / "warm.yaml"
        layer.write_text(yaml.safe_dump(common(settings, task, seed)))
        layers = ["--config", str(config("quickstart.yaml")), "--config", str(layer)]
        ran = lightning(["validate", *layers, *here, "--verbose", "false"])
        file.write_text(json.dumps({"pass1": float(ran.trainer.callback_metrics["val/pass1"])}))
    return json.loads(file.read_text())["pass1"], folder / "warm" / "policy"


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers as one; the second wins, and a class takes its arguments along.

    Example:
        >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
        {'a': {'b': 3, 'c': 2}}
    """
    both = dict(one)
    for name, value in other.items():
        deeper = isinstance(value, Mapping) and isinstance(both.get(name), Mapping)
        both[name] = merged(both[name], value) if deeper else value
    return both


def nested(path: str, value: Any) -> dict[str, Any]:
    """An option with dots in its name as a layer.

    Example:
        >>> nested("model.credit.lam", 0.5)
        {'model': {'credit': {'lam': 0.5}}}
    """
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def ranking(cells: Sequence[dict[str, Any]], thresholds: Sequence[float]) -> str:
    """All candidates of each task and method, by their mean rollouts to the thresholds, the best first."""
    scored: dict[tuple[str, str, str], list[float]] = {}
    for one in cells:
        key = one["task"], one["method"], json.dumps(one["chosen"])
        scored.setdefault(key, []).append(statistics.fmean(rollouts_to(one, t) for t in thresholds))
    lines = ["| task | method | settings | seeds | mean rollouts to the thresholds |", "|---|---|---|---|---|"]
    order = sorted(scored, key=lambda key: (*key[:2], statistics.fmean(scored[key])))
    lines += [
        f"| {t} | {m} | `{c}` | {len(scored[t, m, c])} | {statistics.fmean(scored[t, m, c]):.0f} |" for t, m, c in order
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
