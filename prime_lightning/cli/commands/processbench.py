"""`prime-lightning processbench`: how well step rewards find the first wrong step (ProcessBench, arXiv 2412.06559).

Rows have `problem`, `steps` (texts), and `label`: the number of the first wrong step from 0, or -1 where all are right.
The threshold is chosen on other responses than those that are scored: on `--tune`, or on a share of the problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jsonargparse import ArgumentParser, Namespace

from prime_lightning.cli.commands.score import load_prm, new_file, prm_parser
from prime_lightning.prm.first_error import best_threshold, f1, f1_interval, predict
from prime_lightning.prm.implicit import ImplicitPRM
from prime_lightning.prompts.rows import located_rows
from prime_lightning.rollout.files import Row, dumps, replace_text

COLUMNS = ("problem", "steps", "label")


def parser() -> ArgumentParser:
    """Options of the command."""
    made = prm_parser("processbench", __doc__, reads="A jsonl or parquet file, or a hub id.", writes="New JSON file.")
    made.add_argument("--split", default="train", help="Split of a hub data set: gsm8k, math, olympiadbench, omnimath.")
    made.add_argument("--tune", type=str | None, help="File or hub id to choose the threshold on.")
    made.add_argument("--tune_share", type=float, default=0.5, help="Without --tune, share of the problems for it.")
    made.add_argument("--joiner", default="\n\n", help="Text between two steps.")
    made.add_argument("--chat", type=bool, default=True, help="Give the problem as a chat message, or as plain text.")
    made.add_argument(
        "--score",
        type=Literal["sum", "mean", "prefix"],
        default="sum",
        help="A step's score: its reward, the mean over its tokens, or the sum of all rewards up to its end.",
    )
    made.add_argument("--seed", type=int, default=0, help="Of the split and of the bootstrap.")
    return made


def main(args: list[str]) -> int:
    """Run the command."""
    command = parser()
    options = command.instantiate(command.parse_args(args))
    new_file(options.out)
    tune, scored = parts(options)
    prm = load_prm(options)
    tune_scores, scores = (
        step_scores(prm, part, joiner=options.joiner, chat=options.chat, how=options.score) for part in (tune, scored)
    )
    threshold = best_threshold(tune_scores, [row["label"] for row in tune])
    labels = [row["label"] for row in scored]
    result = {
        **f1(scores, labels, threshold),
        "interval": list(f1_interval(scores, labels, threshold, seed=options.seed)),
        "threshold": threshold,
        "scored": len(scored),
        "with_error": sum(label >= 0 for label in labels),
        "tuned_on": len(tune),
        "score": options.score,
        "reference": prm.reference is not None,
        "predictions": [predict(s, threshold) for s in scores],
        "labels": labels,
    }
    replace_text(options.out, dumps(result, indent=2) + "\n")
    low, high = result["interval"]
    print(
        f"First-error F1 {result['f1']:.3f} (95 % interval {low:.3f} to {high:.3f}): {result['error']:.1%} of "
        f"{result['with_error']} responses with an error, {result['correct']:.1%} of "
        f"{len(scored) - result['with_error']} without.\nThreshold {threshold:.4g}, chosen on {len(tune)} other "
        f"responses. Everything: {options.out}"
    )
    return 0


def parts(options: Namespace) -> tuple[list[Row], list[Row]]:
    """Rows to choose the threshold on, and rows to score.

    Raises:
        ValueError: if a problem is in both.
    """
    rows = read_rows(options.input, options.split)
    if options.tune is None:
        return split(rows, options.tune_share, options.seed)
    tune = read_rows(options.tune, options.split)
    seen = {row["problem"] for row in tune} & {row["problem"] for row in rows}
    if seen:
        raise ValueError(f"Expected other problems in --tune than in --input, got {len(seen)} in both.")
    return tune, rows


def read_rows(path: str, split: str) -> list[Row]:
    """Rows in ProcessBench's format.

    Raises:
        ValueError: for a missing column, a row without steps, an empty step, or a label that is no step's number.
    """
    rows = located_rows(path, split=split)
    for where, row in rows:
        missing = sorted(set(COLUMNS) - row.keys())
        if missing:
            raise ValueError(f"Expected {', '.join(COLUMNS)} in {where}, got none named {', '.join(missing)}.")
        steps, label = row["steps"], row["label"]
        if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
            raise ValueError(f"Expected a list of step texts, none of them empty, in {where}, got {steps!r}.")
        if not isinstance(label, int) or not -1 <= label < len(steps):
            raise ValueError(f"Expected a label from -1 to {len(steps) - 1} in {where}, got {label!r}.")
    return [row for _, row in rows]


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to choose the threshold on, and rows to score; the rows of one problem stay together.

    Raises:
        ValueError: if the share is not inside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"Expected --tune_share between 0 and 1, got {share}.")
    problems = sorted({row["problem"] for row in rows})
    order = np.random.default_rng(seed).permutation(len(problems))
    chosen = {problems[i] for i in order[: round(share * len(problems))]}
    return [row for row in rows if row["problem"] in chosen], [row for row in rows if row["problem"] not in chosen]


def step_scores(
    prm: ImplicitPRM, rows: Sequence[Mapping[str, Any]], *, joiner: str, chat: bool, how: str
) -> list[list[float]]:
    """The scores of the given steps of each row."""
    spans, texts = [], []
    for row in rows:
        ends = np.cumsum([len(step) + len(joiner) for step in row["steps"]]).tolist()
        texts.append(joiner.join(row["steps"]))
        ends[-1] = len(texts[-1])
        spans.append(list(zip([0, *ends[:-1]], ends, strict=True)))
    prompts = [[{"role": "user", "content": row["problem"]}] if chat else row["problem"] for row in rows]
    scored = prm.score_spans(prompts, texts, spans)
    if how == "mean":
        return [[r / max(n, 1) for r, n in zip(s.step_rewards, s.step_tokens, strict=True)] for s in scored]
    return [np.cumsum(s.step_rewards).tolist() if how == "prefix" else s.step_rewards for s in scored]
