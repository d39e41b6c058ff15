"""A real language model on real word problems: a warm start, then RLOO and PRIME from it, and SVAMP before and after.

    python benchmarks/word_problems.py warm --train mawps_asdiv_train.jsonl
    python benchmarks/word_problems.py rl --method rloo --seed 0
    python benchmarks/word_problems.py rl --method prime --seed 0
    python benchmarks/word_problems.py eval --test svamp_test.jsonl
    python benchmarks/word_problems.py credit --seed 0
    python benchmarks/word_problems.py summary

The model learns the form of an answer from the equations of some problems (word_problems_lessons.py); both methods
begin with it and pay for the same number of rollouts. All settings stand in benchmarks/word_problems.yaml. Each
finished stage is a line of stages.jsonl; a stage that was stopped goes on from its last checkpoint when it is called
again, to the same bits, and one that is done is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from pays import merged
from word_problems_credit import credit, number_format
from word_problems_lessons import lessons, numbers, rows_of, write
from word_problems_practice import practice
from word_problems_stories import stories
from word_problems_summary import summary

from prime_lightning.__main__ import main as prime_lightning
from prime_lightning.cli.commands.quickstart import config, quiet
from prime_lightning.evaluation.folder import fingerprint
from prime_lightning.report.runs import read_run
from prime_lightning.rollout.files import append_rows, whole_rows

SETTINGS = Path(__file__).with_suffix(".yaml")
CURVE = (
    "rollout/accuracy",
    "rollout/responses",
    "rollout/tokens",
    "policy/entropy",
    "prm/accuracy",
    "prm/ce",
    "process/accuracy",
    "process/advantage_share",
)


def main(args: Sequence[str]) -> None:
    options = parser().parse_args(args)
    if not Path(options.settings).is_file():
        raise SystemExit(f"Expected a file of settings such as {str(SETTINGS)!r}, got {options.settings!r}.")
    settings, out = yaml.safe_load(Path(options.settings).read_text()) or {}, Path(options.out)
    shipped, parts = yaml.safe_load(SETTINGS.read_text()), (options.device, "methods")
    lacking = [f"{part}.{name}" for part in parts for name in shipped[part] if name not in (settings.get(part) or ())]
    if lacking:
        raise SystemExit(f"Expected {options.settings!r} to have {', '.join(lacking)}, as {str(SETTINGS)!r} has.")
    if options.stage != "summary":
        quiet()
        torch.set_num_threads(options.threads)
        out.mkdir(parents=True, exist_ok=True)
        STAGES[options.stage](options, settings, out)
    print(summary(list(whole_rows(out / "stages.jsonl"))))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("stage", choices=[*STAGES, "summary"])
    options.add_argument("--train", help="of warm: jsonl file with problem, answer and equation")
    options.add_argument("--test", help="of eval: jsonl file with SVAMP; the hub's by default")
    options.add_argument("--model", help="hub id or folder; that of the settings by default")
    options.add_argument("--method", choices=["rloo", "prime"], default="prime")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", choices=["cpu", "cuda24", "cuda80"], default="cpu", help="which settings")
    options.add_argument("--threads", type=int, default=1, help="of torch; equal bits need an equal number")
    options.add_argument("--settings", default=str(SETTINGS))
    options.add_argument("--out", default="runs/word_problems")
    return options


def warm(options: argparse.Namespace, settings: Mapping[str, Any], out: Path) -> None:
    """Split the problems, learn from worked answers, and choose the problems for `rl`."""
    chosen, file = settings[options.device], Path(options.train or "")
    if "warm" not in chosen:
        raise SystemExit(
            f"Expected settings with a warm start, got {options.device!r}, which has none: begin with `rl`."
        )
    if not file.is_file():
        raise SystemExit(f"Expected --train with a jsonl file of problem, answer and equation, got {options.train!r}.")

    rows = rows_of(file)
    problems = practice(rows[: -chosen["held_out"]], chosen["of_each"], chosen["variants"])
    write(out / "train.jsonl", [*problems, *stories(chosen["stories"])])
    write(out / "held_out.jsonl", rows[-chosen["held_out"] :])
    folder = out / "warm"
    folder.mkdir(exist_ok=True)
    count = write(folder / "lessons.jsonl", lessons(rows[: chosen["lessons"]]))
    read_in = {"init_args": {"path": str(folder / "lessons.jsonl"), "template": template()}}
    start = {"model": {"policy": model_of(options, settings)}, "data": {"lessons": read_in}}

    def run() -> dict[str, Any]:
        configs = [config("sft.yaml"), config("strategy/cpu.yaml")]
        seconds = trained("sft", configs, merged(chosen["warm"], start), folder, 42, chosen["save_every"])
        return {"lessons": count, "seconds": seconds}

    once(out, {"stage": "warm", "settings": digest(chosen["warm"], chosen["lessons"])}, run)


def rl(options: argparse.Namespace, settings: Mapping[str, Any], out: Path) -> None:
    """Train by one method from the warm start."""
    chosen, folder = settings[options.device], folder_of(out, options)
    if "warm" in chosen:
        needed(out / "warm" / "policy", "warm --train FILE")
    configs, layer = rl_layers(options, settings, out)

    def run() -> dict[str, Any]:
        seconds = trained("fit", configs, layer, folder, options.seed, chosen["save_every"])
        rows = read_run(folder).rows.values()
        return {"seconds": seconds, "curve": {name: [row[name] for row in rows if name in row] for name in CURVE}}

    given = [layer, [path.name for path in configs], fingerprint(layer["model"]["policy"])]
    given += [rows_of(out / "train.jsonl")] if "warm" in chosen else []
    once(out, {"stage": "rl", "method": options.method, "seed": options.seed, "settings": digest(*given)}, run)


def rl_layers(options: argparse.Namespace, settings: Mapping[str, Any], out: Path) -> tuple[list[Path], dict[str, Any]]:
    """The configurations of a run, and what goes on top of them."""
    chosen = settings[options.device]
    layer = merged(chosen["rl"], settings["methods"][options.method])
    start: dict[str, Any] = {"model": {"policy": model_of(options, settings)}}
    if "warm" in chosen:
        rows = {"init_args": {"path": str(out / "train.jsonl")}}
        data = {"train": rows, "validation": rows, "engine": {"init_args": engine_of(options)}}
        start = {"model": {"policy": str(out / "warm" / "policy")}, "data": data}
    return [config(name) for name in ("prime.yaml", *chosen["configs"])], merged(layer, start)


def trained(what: str, configs: Sequence[Path], layer: dict[str, Any], folder: Path, seed: int, every: int) -> float:
    """Run `sft` or `fit` to its end; seconds of all its starts."""
    begun, clock = time.time(), folder / "seconds.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layer.yaml").write_text(yaml.safe_dump(merged(layer, placed(what, folder, every))))
    try:
        called(command(what, configs, folder, seed))
    finally:
        append_rows(clock, [{"seconds": time.time() - begun}])
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes; the models are beside it
    return float(sum(row["seconds"] for row in whole_rows(clock)))


def command(what: str, configs: Sequence[Path], folder: Path, seed: int) -> list[str]:
    """What `prime-lightning` is called with: the layers, and the last checkpoint if there is one."""
    last = folder / "checkpoints" / "last.ckpt"
    words = [word for path in (*configs, folder / "layer.yaml") for word in ("--config", str(path))]
    return [what, *words, "--seed_everything", str(seed), *(["--ckpt_path", str(last)] if last.exists() else [])]


def called(words: Sequence[str]) -> None:
    """Run `prime-lightning`; what it has to complain about it says itself, in a line, and the stage ends."""
    if status := prime_lightning(words):
        raise SystemExit(status)


def placed(what: str, folder: Path, every: int) -> dict[str, Any]:
    """Where a run writes, and how often it saves."""
    roles = ["policy"] if what == "sft" else ["policy", "prm"]
    saved = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": every, "save_last": True, "save_top_k": 0}
    callbacks = [
        made("prime_lightning.training.callbacks.HuggingFaceExport", folder=str(folder), roles=roles),
        made("lightning.pytorch.callbacks.ModelCheckpoint", **saved),
    ]
    if what == "fit":
        callbacks.append(made("prime_lightning.training.callbacks.RolloutLog", folder=str(folder)))
    logger = made("lightning.pytorch.loggers.CSVLogger", save_dir=str(folder), name="csv", flush_logs_every_n_steps=1)
    return {"trainer": {"default_root_dir": str(folder), "callbacks": callbacks, "logger": [logger]}}


def made(path: str, **given: Any) -> dict[str, Any]:
    """A class and its arguments, as configurations write them."""
    return {"class_path": path, "init_args": given}


def score(options: argparse.Namespace, settings: Mapping[str, Any], out: Path) -> None:
    """Greedy answers of every model that there is: as it comes, warm, and trained."""
    asked = merged(settings[options.device]["evaluation"], {"engine": engine_of(options)})
    found = {"untrained": model_of(options, settings)}
    found |= {path.parent.name: str(path) for path in sorted(out.glob("*/policy"))}
    for name, model in found.items():
        key = {"stage": "eval", "model": name, "settings": digest(asked, fingerprint(model))}
        folder = out / "evaluations" / f"{name}-{key['settings']}"
        words = ["evaluate", "--model", model, "--template", "chat", "--out", str(folder)]
        words += ["--benchmark", asked["benchmark"]]
        words += ["--limit", str(asked["limit"]), "--max_tokens", str(asked["max_tokens"])]
        words += ["--data", options.test] if options.test else []
        given = dict(asked["engine"])
        words += ["--engine", given.pop("class_path"), *(f"--engine.{name}={value}" for name, value in given.items())]

        def run(folder: Path = folder, words: Sequence[str] = tuple(words)) -> dict[str, Any]:
            called(words)
            result = json.loads((folder / "results.json").read_text())["benchmarks"][asked["benchmark"]]
            rows = rows_of(folder / f"{asked['benchmark']}.jsonl")
            return {"result": result, "parts": by_numbers(rows), "right": [row["score"] for row in rows]}

        once(out, key, run)


def engine_of(options: argparse.Namespace) -> dict[str, str]:
    """The number format of a CPU; others know theirs."""
    return {"dtype": number_format()} if options.device == "cpu" else {}


def by_numbers(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy where the problem gives two numbers, and where it gives more; what templates add has none.

    Example:
        >>> given = [("2 and 3", 1.0), ("2, 3 and 4", 0.0), ("6 of 7", 0.0)]
        >>> by_numbers([{"prompt": prompt, "score": score} for prompt, score in given])
        {'two numbers': 0.5, 'more numbers': 0.0}
    """
    scores: dict[str, list[float]] = {"two numbers": [], "more numbers": []}
    for one in answers:
        scores["more numbers" if len(numbers(one["prompt"])) > 2 else "two numbers"].append(one["score"])
    return {name: fmean(some) if some else 0.0 for name, some in scores.items()}


def blame(options: argparse.Namespace, settings: Mapping[str, Any], out: Path) -> None:
    """Does the process reward fall at the first wrong word of an answer to a problem that was never trained on?"""
    if "warm" not in settings[options.device]:
        raise SystemExit(
            f"Expected settings with a warm start, whose equations tell what is wrong, got {options.device!r}."
        )
    folder = folder_of(out, options)
    needed(folder / "prm", f"rl --method prime --seed {options.seed}")
    models = [folder / "policy", folder / "prm", out / "warm" / "policy"]  # the last is the reference
    key = {"stage": "credit", "method": options.method, "seed": options.seed}
    key["settings"] = digest(*(fingerprint(str(model)) for model in models))
    once(out, key, lambda: credit(folder, out / "held_out.jsonl", template()))


STAGES: dict[str, Callable[[argparse.Namespace, Mapping[str, Any], Path], None]] = {
    "warm": warm,
    "rl": rl,
    "eval": score,
    "credit": blame,
}


def needed(folder: Path, stage: str) -> None:
    """A stage says which other comes before it."""
    if not folder.is_dir():
        raise SystemExit(f"Expected a model in {str(folder)!r}, got none. First: python {sys.argv[0]} {stage}")


def once(out: Path, key: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> None:
    """Run a stage and note it, unless it is noted."""
    if any(key.items() <= done.items() for done in whole_rows(out / "stages.jsonl")):
        print(f"done before: {json.dumps(key)}", flush=True)
        return
    found = run()
    made_by = {"torch": torch.__version__, "python": sys.version.split()[0], "threads": torch.get_num_threads()}
    append_rows(out / "stages.jsonl", [dict(key) | dict(found) | {"made_by": made_by}])


def template() -> dict[str, Any]:
    """How word problems are asked: as their configuration says."""
    read_in = yaml.safe_load(config("data/word_problems.yaml").read_text())
    return dict(read_in["data"]["train"]["init_args"]["template"])


def digest(*settings: Any) -> str:
    """Settings and models in short; a stage of others is run anew."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def folder_of(out: Path, options: argparse.Namespace) -> Path:
    """Of a run."""
    return out / f"{options.method}-seed{options.seed}"


def model_of(options: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    """The model that everything starts from."""
    return str(options.model or settings[options.device]["model"])


if __name__ == "__main__":
    main(sys.argv[1:])
