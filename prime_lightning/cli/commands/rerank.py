"""`prime-lightning rerank`: best-of-n by a PRM against majority vote and pass@n, for n = 1, 2, 4, ..., with intervals.

Completions come from `--input` (rows with `prompt`, `response` or `completion`, and `label`, `score`, or an `answer`
to grade against) or are sampled now: `--sample.model`, `--sample.prompts`, `--sample.engine`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jsonargparse import ArgumentParser, Namespace

from prime_lightning.cli.commands.score import add_steps, load_prm, prm_parser, score_all
from prime_lightning.engines import Engine
from prime_lightning.evaluation.statistics import bootstrap, pass_at_k, powers_of_two
from prime_lightning.models.prm_folder import claim
from prime_lightning.prm.responses import LABELS, is_empty, read_rollouts, without_empty
from prime_lightning.prm.selection import RULES, best_of_n, sets_of, vote
from prime_lightning.prompts.dataset import Prompts
from prime_lightning.rollout import Rollout, Sampling
from prime_lightning.rollout.files import dumps, replace_rows, replace_text
from prime_lightning.sampling.acceptance import AccuracyFilter
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.sampling.validation import EvaluationLoader
from prime_lightning.verifiers import Verifiers, final_answer

VOTED = "vote_"
RIGHT = "(right)"  # right answers are one candidate of the vote, however they are written


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The samples of one problem.

    Example:
        >>> two = {"outcomes": np.array([1.0, 0.0]), "answers": ["7", "4"]}
        >>> Problem(**two, scores={"sum": np.array([0.5, -0.5])}).at("sum", 2, sets=16, seed=0)
        1.0
    """

    outcomes: np.ndarray
    """`[N]` 1 where it is right; a program that passes some of its tests is wrong, as in pass@k."""
    answers: list[str | None]
    """Final answer of each sample, for votes."""
    scores: dict[str, np.ndarray]
    """`[N]` for each rule."""

    def at(self, method: str, n: int, *, sets: int, seed: int) -> float:
        """How often a method picks a right one from a set of n samples, over the sets."""
        if method == "pass":
            return pass_at_k(int((self.outcomes == 1).sum()), len(self.outcomes), n)
        if method in self.scores:
            return best_of_n(self.scores[method], self.outcomes, n)
        sets_SN = sets_of(len(self.outcomes), n, sets, np.random.default_rng([seed, n]))
        if method == "majority":
            return vote(self.answers, np.ones(len(self.answers)), self.outcomes, sets_SN)
        score_N = self.scores[method.removeprefix(VOTED)]
        return vote(self.answers, np.exp(-np.logaddexp(0, -score_N)), self.outcomes, sets_SN)  # sigmoid


def parser() -> ArgumentParser:
    """Options of the command."""
    reads, writes = "A jsonl, parquet or csv file, or a hub id.", "New folder: results.json, table.md, scored.jsonl."
    made = prm_parser("rerank", __doc__, reads=reads, writes=writes, must=False)
    made.add_argument("--sample.model", type=str | None, help="Hub id or folder of the model to sample from.")
    made.add_argument(
        "--sample.prompts", type=Prompts | None, help="What to sample answers to; a class by import path."
    )
    made.add_argument("--sample.engine", type=Engine | None, help="What samples; a class by import path.")
    made.add_argument("--sample.problems", type=int, default=100, help="How many problems.")
    made.add_argument("--sample.sampling", type=Sampling, default=Sampling(samples=16), help="How answers are drawn.")
    made.add_argument("--kind", type=Literal["math", "exact", "code"], default="math", help="What the answers are.")
    made.add_argument("--n", type=list[int] | None, help="Sizes of the sets; by default 1, 2, 4, ...")
    made.add_argument("--rules", type=list[str], default=list(RULES), help="How step rewards become a score.")
    made.add_argument(
        "--sets", type=int, default=512, help="Votes are averaged over at most so many sets of n samples."
    )
    made.add_argument("--seed", type=int, default=0, help="Of the sets and of the bootstrap.")
    add_steps(made)
    return made


def main(args: list[str]) -> int:
    """Run the command."""
    command = parser()
    options = command.instantiate(command.parse_args(args))
    claim(options.out)
    unknown = sorted(set(options.rules) - RULES.keys())
    if unknown:
        raise ValueError(f"Expected rules out of {', '.join(RULES)}, got {', '.join(unknown)}.")
    sampled = options.sample.model is not None
    if sampled == (options.input is not None):
        raise ValueError("Expected completions from either --input or --sample.model, got both or neither.")
    prm = load_prm(options)
    rollouts = known(sample(options) if sampled else read(options.input, options.kind))
    written = iter(score_all(prm, [one for one in rollouts if not is_empty(one)], options.steps))
    rewards = [[] if is_empty(one) else next(written).step_rewards for one in rollouts]
    problems = group(rollouts, rewards, options.rules)
    result = compare(problems, sizes(problems, options.n), options.rules, sets=options.sets, seed=options.seed)
    result |= {"reference": prm.reference is not None, "seed": options.seed}
    replace_text(options.out / "results.json", dumps(result, indent=2) + "\n")
    replace_text(options.out / "table.md", table(result))
    rows = (
        {**one.to_row(), "final": final(one), **reward(steps)} for one, steps in zip(rollouts, rewards, strict=True)
    )
    replace_rows(options.out / "scored.jsonl", rows)
    print(table(result) + f"\nEverything: {options.out}")
    return 0


def reward(steps: Sequence[float]) -> dict[str, Any]:
    """Columns of a response with these rewards; an empty one has none."""
    return {"step_rewards": steps, "reward": sum(steps) if steps else None}


def final(rollout: Rollout) -> str | None:
    """The final answer of a completion, for votes."""
    return final_answer(rollout.completion.text, rollout.prompt.kind)


def read(path: str, kind: str) -> list[Rollout]:
    """Labelled responses of a file; without labels they are graded here.

    Empty ones stay: they are samples, too, though no rule picks them.

    Raises:
        ValueError: if there is neither a label nor an answer to grade against.
    """
    rows = read_rollouts(path, labelled=None, kind=kind)
    columns = {name for row, _ in rows for name in row}
    without_empty(rows, path, drop=True)  # refuses a file of nothing else
    rollouts = [one for _, group in rows for one in group]
    if columns & set(LABELS):
        return rollouts
    if "answer" not in columns and kind != "code":
        raise ValueError(f"Expected the column label, labels, score, or an answer to grade against, in {path!r}.")
    with Verifiers() as verifiers:
        verdicts = list(verifiers.map((one.prompt, one.completion.text) for one in rollouts))
    return [replace(one, verdict=verdict) for one, verdict in zip(rollouts, verdicts, strict=True)]


def known(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with a verdict; the others are counted aloud.

    Raises:
        ValueError: if there is none.
    """
    found = [one for one in rollouts if one.verdict.known]
    if not found:
        raise ValueError(f"Expected responses with a verdict, got {len(rollouts)} without.")
    if len(found) < len(rollouts):
        warnings.warn(f"{len(rollouts) - len(found)} responses without a verdict are left out.", stacklevel=2)
    return found


def sample(options: Namespace) -> list[Rollout]:
    """Fresh graded completions from an engine.

    Raises:
        ValueError: without prompts or an engine.
    """
    chosen = options.sample
    if chosen.prompts is None or chosen.engine is None:
        raise ValueError("Expected --sample.prompts and --sample.engine with --sample.model, got one of them missing.")
    data = RolloutDataModule(
        chosen.model,
        train=chosen.prompts,
        engine=chosen.engine,
        sampling=chosen.sampling,
        prompts_per_batch=chosen.problems,
        accuracy_filter=AccuracyFilter(min_valid=1),
    )
    data.setup("validate")
    try:
        loader = EvaluationLoader(data.source(chosen.prompts), chosen.sampling, chosen.problems, chosen.problems, 0, 1)
        rollouts = [rollout for batch in loader for rollout in batch.rollouts]
    finally:
        data.close()
    if all(map(is_empty, rollouts)):
        raise ValueError(f"Expected answers of {chosen.model!r}, got {len(rollouts)} empty ones.")
    return rollouts


def group(rollouts: Sequence[Rollout], rewards: Sequence[list[float]], rules: Sequence[str]) -> list[Problem]:
    """The samples of each prompt together."""
    members: dict[int, list[int]] = {}
    for i, one in enumerate(rollouts):
        members.setdefault(one.prompt.draw, []).append(i)
    answers, right = [final(one) for one in rollouts], [one.verdict.score == 1 for one in rollouts]
    return [
        Problem(
            outcomes=np.array([right[i] for i in rows], float),
            answers=[RIGHT if answers[i] and right[i] else answers[i] for i in rows],
            scores={
                rule: np.array([RULES[rule](rewards[i]) if rewards[i] else -np.inf for i in rows]) for rule in rules
            },
        )
        for rows in members.values()
    ]


def sizes(problems: Sequence[Problem], wanted: Sequence[int] | None) -> list[int]:
    """The sizes of sets: those wanted, or powers of two and the most that every problem has.

    Raises:
        ValueError: if a problem has too few samples.
    """
    most = min(len(problem.outcomes) for problem in problems)
    if wanted is None:
        return powers_of_two(most)
    if min(wanted) < 1 or max(wanted) > most:
        raise ValueError(f"Expected --n from 1 to {most}, the fewest samples that a problem has, got {list(wanted)}.")
    return sorted(set(wanted))


def compare(
    problems: Sequence[Problem], sizes: Sequence[int], rules: Sequence[str], *, sets: int, seed: int
) -> dict[str, Any]:
    """Share right of each method at each n, with the bootstrap over problems; and the paired gain over majority."""
    voting = any(answer is not None for problem in problems for answer in problem.answers)
    methods = ["pass", *rules, *(["majority", *(VOTED + rule for rule in rules)] if voting else [])]
    value_P = {(m, n): np.array([p.at(m, n, sets=sets, seed=seed) for p in problems]) for m in methods for n in sizes}

    def mean(value_P: np.ndarray) -> dict[str, Any]:
        return {"mean": float(value_P.mean()), "interval": list(bootstrap(np.mean, value_P, seed=seed))}

    def row(method: str, n: int) -> dict[str, Any]:
        found = {"n": n, **mean(value_P[method, n])}
        if voting and method not in ("pass", "majority"):
            found["minus_majority"] = mean(value_P[method, n] - value_P["majority", n])
        return found

    samples = [len(p.outcomes) for p in problems]
    return {
        "problems": len(problems),
        "samples": [min(samples), max(samples)],
        "methods": {method: [row(method, n) for n in sizes] for method in methods},
    }


def table(result: dict[str, Any]) -> str:
    """The results as a Markdown table: a row a method, a column an n, 95 % intervals."""
    sizes = [entry["n"] for entry in result["methods"]["pass"]]
    lines = ["| method | " + " | ".join(f"n = {n}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for method, row in result["methods"].items():
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(entry["mean"], *entry["interval"]) for entry in row]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    low, high = result["samples"]
    said = f"{result['problems']} problems, {low if low == high else f'{low} to {high}'} samples each"
    return "\n".join(lines) + f"\n\n{said}; how often a right one is picked, 95 % bootstrap interval over problems.\n"
