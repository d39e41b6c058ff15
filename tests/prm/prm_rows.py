"""Labelled responses of a teacher, and `prime-lightning prm` for a model this small."""

from pathlib import Path

import numpy as np

from prime_lightning.__main__ import main
from prime_lightning.prompts.arithmetic import DIGITS, ArithmeticLessons, Chains, Teacher, step_truth

CONF = Path(__file__).parent.parent.parent / "conf"
CHAINS = Chains(operations=2)
ON_CPU = ("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_model_summary=false",
          "--model.loading={attention: sdpa, packed: false, gradient_checkpointing: false}")  # fmt: skip


def labelled_rows(problems=600, samples=4, seed=0):
    """Answers of the imperfect teacher, several a problem, and whether the final result is right."""
    rng, teacher = np.random.default_rng(seed), Teacher(chains=CHAINS, reliability=0.8)
    for _ in range(problems):
        problem = CHAINS.problem(rng)
        for _ in range(samples):
            response = teacher.solve(problem, rng)
            right = response.endswith("#" + DIGITS[CHAINS.results(problem)[-1]])
            yield {"prompt": problem, "response": response, "label": int(right)}


def arithmetic_rows(size, seed=0, operations=10):
    """Rows in ProcessBench's format from the embedded arithmetic's teacher, whose every step can be checked."""
    lessons = ArithmeticLessons(size=size, seed=seed, operations=operations)
    chains, rows = lessons.teacher.chains, []
    for i in range(size):
        lesson = lessons[i]
        truth = step_truth(lesson["problem"], lesson["response"], chains)
        written, final = lesson["response"].split("#")
        rows.append(
            {
                "id": f"arithmetic-{i}",
                "generator": "prime_lightning.prompts.arithmetic.Teacher",
                "problem": lesson["problem"],
                "steps": [f"{step};" for step in written.split(";")[:-1]] + [f"#{final}"],
                "final_answer_correct": final == DIGITS[chains.results(lesson["problem"])[-1]],
                "label": truth.index(False) if False in truth else -1,
            }
        )
    return rows


def train_prm(out, model, path, *more):
    """`prime-lightning prm` on the shipped configuration, for a model this small."""
    small = ("--model.beta=0.5", "--model.step_separator=;", "--data.prompts_per_batch=16")
    rate = "--model.optimizer.init_args.lr=5e-4"
    where = (f"--trainer.default_root_dir={out}", f"--model.prm={model}", f"--data.path={path}")
    return main(["prm", "--config", str(CONF / "prm.yaml"), *ON_CPU, *small, rate, *where, *map(str, more)])
