"""Which mode of the algorithm does what on the embedded arithmetic: the evidence behind the default.

    python benchmarks/modes.py --out runs/modes --seeds 0 1 2

For each seed one warm start, and from it one run a mode; pass@1 at temperature 1 on 1,000 problems that no run trains
on. The task is tiny: it shows what breaks, and cannot show what wins on real problems. Writes results.json and
results.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from prime_lightning.cli.commands.quickstart import config, quiet
from prime_lightning.cli.lightning_cli import lightning
from prime_lightning.prompts.arithmetic import write_model

MODES = {
    "default": [],
    "paper": ["mode/paper.yaml"],
    "official": ["mode/official.yaml"],
    "outcome only (RLOO)": ["ablation/no_prm.yaml"],
    "GRPO": ["ablation/grpo.yaml"],
    "REINFORCE": ["ablation/reinforce.yaml"],
    "double forward": ["ablation/double_forward.yaml"],
    "DPO PRM": ["ablation/dpo_prm.yaml"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/modes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--iterations", type=int, default=40)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    out, rows = Path(options.out), []
    for seed in options.seeds:
        folder = out / f"seed{seed}"
        common = ["--trainer.default_root_dir", str(folder), "--seed_everything", str(seed)]
        write_model(folder / "init", seed=seed)
        lightning(["sft", "--config", str(config("quickstart_sft.yaml")), *common])
        for mode in options.modes:
            rows.append(run(mode, seed, folder, options.iterations))
            print(rows[-1], flush=True)
    versions = f"torch {torch.__version__}, python {sys.version.split()[0]}"
    (out / "results.json").write_text(json.dumps({"versions": versions, "runs": rows}, indent=1))
    (out / "results.md").write_text(table(rows, versions, " ".join(sys.argv)))
    print((out / "results.md").read_text())


def run(mode: str, seed: int, folder: Path, iterations: int) -> dict[str, float | str]:
    """One mode on one seed's warm start."""
    here = folder / mode.replace(" ", "_")
    warm = ["--model.policy", str(folder / "warm" / "policy")]
    layers = [f"--config={config(name)}" for name in ("quickstart.yaml", *MODES[mode])]
    common = [*layers, "--trainer.default_root_dir", str(here), "--seed_everything", str(seed)]
    alone = "--trainer.callbacks=[]"
    start = time.process_time()
    fitted = lightning(["fit", *common, *warm, "--trainer.max_steps", str(iterations), alone])
    seconds = time.process_time() - start
    (result,) = fitted.trainer.validate(fitted.model, fitted.datamodule, verbose=False)
    with next((here / "csv").glob("version_*/metrics.csv")).open() as file:
        curve = [float(row["rollout/accuracy"]) for row in csv.DictReader(file) if row.get("rollout/accuracy")]
    return {
        "mode": mode,
        "seed": seed,
        "pass1": result["val/pass1"],
        "mean_of_curve": statistics.fmean(curve),
        "cpu_seconds": seconds,
    }


def table(rows: list[dict], versions: str, command: str) -> str:
    """Markdown: mean and spread over seeds."""
    lines = [
        "| mode | pass@1 after, mean (min to max over seeds) | mean accuracy over the run | CPU seconds a run |",
        "|---|---|---|---|",
    ]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        ends = [row["pass1"] for row in mine]
        mean = statistics.fmean(ends)
        curve, cpu = (statistics.fmean(row[k] for row in mine) for k in ("mean_of_curve", "cpu_seconds"))
        lines.append(f"| {mode} | {mean:.3f} ({min(ends):.3f} to {max(ends):.3f}) | {curve:.3f} | {cpu:.0f} |")
    seeds = sorted({row["seed"] for row in rows})
    return "\n".join([*lines, "", f"Seeds {seeds}; {versions}; `python {command}`.", ""])


if __name__ == "__main__":
    main()
