"""Sample completions where the logger can show them: a table in W&B, text in TensorBoard."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from prime_lightning.training.panel import Iteration

COLUMNS = ["iteration", "prompt", "completion", "answer", "verdict", "process return", "tokens"]


class SampleTable(Callback):
    """Logs a few completions of the iteration to every logger that takes tables or text; the others get none.

    Completions are hostile text: what could move a cursor, turn the reading direction or break out of a block is
    written as an escape sequence.

    Args:
        rows: Completions of an iteration, evenly from the batch.
        every: Iterations between two logs.
    """

    def __init__(self, rows: int = 8, every: int = 10) -> None:
        if rows < 1 or every < 1:
            raise ValueError(f"Expected `rows` and `every` of at least 1, got {rows} and {every}.")
        self.rows, self.every = rows, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log this iteration's."""
        iteration: Iteration = outputs["iteration"]
        if not trainer.is_global_zero or iteration.number % self.every:
            return
        table = self.table(iteration)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(key="samples", columns=COLUMNS, data=table, step=iteration.number)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", as_text(table), iteration.number)

    def table(self, iteration: Iteration) -> list[list[Any]]:
        """Rows of the table; `process return` is the sum of the response's normalised process reward."""
        rollouts, process_BT = iteration.batch.rollouts, iteration.process_BT
        count = min(self.rows, len(rollouts))
        return [
            [
                iteration.number,
                visible(rollouts[i].prompt.text),
                visible(rollouts[i].completion.text),
                visible(rollouts[i].prompt.answer),
                str(rollouts[i].verdict.label),
                None if process_BT is None else float(process_BT[i].sum()),
                len(rollouts[i].completion.token_ids),
            ]
            for i in (n * len(rollouts) // count for n in range(count))
        ]


def visible(text: str) -> str:
    r"""Text with everything that is not printable, but for line feeds, as escape sequences.

    Example:
        >>> visible("7\x1b[31m\u202e\ud800")
        '7\\x1b[31m\\u202e\\ud800'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def as_text(table: list[list[Any]]) -> str:
    r"""A table as markdown of indented blocks, which nothing inside of them can end.

    Example:
        >>> print(as_text([[3, "1+1=", "```\n<b>2</b>", "2", "correct", 0.5, 4]]))
        iteration: 3, verdict: correct, process return: 0.5, tokens: 4
        <BLANKLINE>
            prompt     | 1+1=
            answer     | 2
            completion | ```
                       | <b>2</b>
        <BLANKLINE>
    """
    blocks = []
    for iteration, prompt, completion, answer, verdict, process, tokens in table:
        shown = "none" if process is None else f"{process:.4g}"
        blocks.append(f"iteration: {iteration}, verdict: {verdict}, process return: {shown}, tokens: {tokens}\n\n")
        for name, text in (("prompt", prompt), ("answer", answer), ("completion", completion)):
            for i, line in enumerate(text.split("\n")):
                blocks.append(f"    {name if i == 0 else '':<10} | {line}\n")
        blocks.append("\n")
    return "".join(blocks)[:-1]
