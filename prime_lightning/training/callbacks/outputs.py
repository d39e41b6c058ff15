"""What a run hands out: rollouts to disk, models to folders, sample completions to loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from prime_lightning.models.logprobs import causal_lm
from prime_lightning.models.lora import merged_parameters
from prime_lightning.models.pretrained import save
from prime_lightning.models.prm_folder import describe
from prime_lightning.rollout import Rollout
from prime_lightning.rollout.files import Row, append_rows, replace_rows, whole_rows
from prime_lightning.training.panel import Iteration
from prime_lightning.training.run_metadata import run_metadata
from prime_lightning.training.stepping import devices

Steps = Callable[[Rollout, list[str]], list[tuple[int, int, bool]]]
"""`(rollout, its tokens as text) -> (first token, token after the last, whether it is right)` of each step."""


class RolloutLog(Callback):
    """Writes trained-on rollouts with their token rewards as jsonl, one line a response; docs/report.md lists the keys.

    Args:
        folder: Where `rollouts.jsonl` goes.
        groups: Prompts of an iteration that are kept, of the first rank's.
        every: Iterations between two writes.
        steps: Says which steps are truly right, on tasks where that is known, such as
            `prime_lightning.prompts.arithmetic.written_steps`. Only the report reads it.
    """

    def __init__(self, folder: str, groups: int = 4, every: int = 1, steps: Steps | None = None) -> None:
        self.path, self.groups, self.every, self.steps = Path(folder) / "rollouts.jsonl", groups, every, steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget lines of iterations that a resumed run will do again, and a line that a crash cut off."""
        if not trainer.is_global_zero or not self.path.is_file():
            return
        done = trainer.global_step
        replace_rows(self.path, (row for row in whole_rows(self.path) if row.get("iteration", done) < done))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write this iteration."""
        iteration: Iteration = outputs["iteration"]
        if not trainer.is_global_zero or iteration.number % self.every:
            return
        scale = iteration.metrics.get("process/scale")
        unit = {} if scale is None else {"beta": pl_module.reward.beta, "scale": _short(scale)}  # type: ignore[union-attr]
        rows = rollout_rows(iteration, self.groups, pl_module.tokenizer, self.steps)  # type: ignore[arg-type]
        append_rows(self.path, (row | unit for row in rows))


def rollout_rows(iteration: Iteration, groups: int, tokenizer: Any, steps: Steps | None = None) -> Iterator[Row]:
    """The responses of the first groups of an iteration, with rewards and advantages token by token."""
    batch = iteration.batch
    first = batch.group_B.unique()[:groups]  # numbered among those of all ranks
    for i, rollout in enumerate(batch.rollouts):
        if batch.group_B[i] not in first:
            return
        ids = rollout.completion.token_ids
        tokens = [tokenizer.decode([token]) for token in ids]
        per_token = {
            name: [_short(x) for x in number_BT[i, : len(ids)].tolist()]
            for name, number_BT in (("process_reward", iteration.process_BT), ("advantage", iteration.advantage_BT))
            if number_BT is not None
        }
        yield {
            "iteration": iteration.number,
            **rollout.to_row(),
            "tokens": tokens,
            **({"steps": steps(rollout, tokens)} if steps else {}),
            **per_token,
        }


def _short(x: float) -> float:
    """Five digits: half the file."""
    return float(f"{x:.5g}")


class HuggingFaceExport(Callback):
    """Writes trained models as Hugging Face folders when training ends, with model cards, and the PRM's JSON file.

    Args:
        folder: Each role becomes a folder in it.
        roles: Which models: `policy`, `prm`.
        adapters: Write the adapters of a LoRA model alone; false merges them into a model that needs no `peft`.
    """

    def __init__(self, folder: str, roles: list[str] | None = None, adapters: bool = False) -> None:
        self.folder, self.roles = Path(folder), roles or ["policy"]
        self.adapters = adapters

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if there are models already, which will be replaced."""
        there = [str(self.folder / role) for role in self.roles if (self.folder / role).exists()]
        if there and trainer.is_global_zero:
            warnings.warn(f"When training ends, new models will replace those in {', '.join(there)}.", stacklevel=2)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write them; weights are those of the last iteration."""
        metadata = run_metadata(pl_module)
        latest = self.folder / "policy" if "policy" in self.roles else None  # what the PRM was last compared with
        for role in self.roles:
            model = getattr(pl_module, role)
            if model is None:
                continue
            weights = {}
            for name, weight in self._weights(model.model, devices(trainer).whole):
                if trainer.is_global_zero:
                    weights[name] = weight.cpu()
            if trainer.is_global_zero:
                kept = model.model if self.adapters else causal_lm(model.model)
                save(kept, pl_module.tokenizer, self.folder / role, weights)  # type: ignore[arg-type]
                reference = metadata["names"].get("reference") or latest
                describe(self.folder / role, role, metadata, None if reference is None else str(reference))

    def _weights(self, model: nn.Module, whole: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What is written, one after another; all ranks take part."""
        if not self.adapters:
            return merged_parameters(model, whole)
        return ((name, whole(weight)) for name, weight in model.state_dict(keep_vars=True).items())


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
