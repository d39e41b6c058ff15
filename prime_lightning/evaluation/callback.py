"""`Benchmarks`: benchmarks while training runs, with the policy's present weights, without disturbing it."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from prime_lightning.engines.host_group import of_all_ranks
from prime_lightning.evaluation.benchmark import Benchmark, load_benchmark
from prime_lightning.evaluation.runner import Scores, all_empty, not_asked, sampled
from prime_lightning.prompts.dataset import Prompts
from prime_lightning.rollout import Sampling
from prime_lightning.rollout.files import Row, append_rows, replace_rows, whole_rows
from prime_lightning.sampling.acceptance import Tally
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.verifiers import Verifiers


class Benchmarks(Callback):
    """Runs benchmarks before, during and after training, through the data module's engine, spread over ranks.

    Each result is logged as `<benchmark>/<metric>`, stands in `trainer.callback_metrics` (so that `ModelCheckpoint` can
    monitor `aime2024/avg16`), and is a line of `<folder>/benchmarks.jsonl`; the samples are in
    `<folder>/benchmarks/<benchmark>/<iteration>.jsonl`. Iteration n is the policy after n iterations.

    Args:
        folder: Of the run.
        benchmarks: Names, or YAML files, of benchmarks.
        every: Iterations between two evaluations.
        before: Evaluate before the first iteration.
        after: Evaluate after the last.
        limit: Only the first problems of each; None asks all.
        template: Prompt template, `prime`, `chat` or `base`.
        chat: Use the tokenizer's chat template; False for base models.
        data: Local files by benchmark, instead of the hub.
        max_tokens: Longest completion; None takes the benchmark's.
        chat_template_kwargs: Variables of the chat template, such as `enable_thinking: false`.

    Raises:
        ValueError: if a benchmark cannot be read, or the data module has no engine.
    """

    def __init__(
        self,
        folder: str,
        benchmarks: list[str],
        every: int = 16,
        before: bool = True,
        after: bool = True,
        limit: int | None = None,
        template: str = "prime",
        chat: bool = True,
        data: dict[str, str] | None = None,
        max_tokens: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if every < 1 or (limit is not None and limit < 1):
            raise ValueError(f"Expected `every` and `limit` of at least 1, got {every} and {limit}.")
        self.folder, self.benchmarks, self.every = Path(folder), benchmarks, every
        self.before, self.after, self.limit = before, after, limit
        self.template, self.chat, self.data, self.max_tokens = template, chat, data or {}, max_tokens
        self.variables = chat_template_kwargs
        self.loaded: list[tuple[Benchmark, Prompts]] = []
        self.graders: dict[str, Verifiers] = {}  # by where the answers stand
        self.tally: Tally | None = None  # of the benchmark that is running, for the progress bar
        self._done = -1

    @property
    def path(self) -> Path:
        """One line for each benchmark and iteration."""
        return self.folder / "benchmarks.jsonl"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the benchmarks, so that a missing file ends the run before it begins."""
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, RolloutDataModule):
            raise ValueError("Expected a data module with an engine (RolloutDataModule) to run benchmarks, got none.")
        self.data_module = data
        for name in self.benchmarks if not self.loaded else ():
            benchmark = load_benchmark(name)
            local = self.data.get(benchmark.name)
            prompts = benchmark.load(
                data=local, template=self.template, chat=self.chat, chat_template_kwargs=self.variables
            )
            self.loaded.append((benchmark, prompts))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget results that a resumed run will get again, take up the last one, and evaluate before training."""
        for benchmark, prompts in self.loaded:  # before it is their turn
            self.data_module.source(prompts).longest_prompt(self._sampling(benchmark))
        self._done = self._resume(trainer)
        if self.before and trainer.global_step == 0:
            self._run(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every `every` iterations."""
        if trainer.global_step % self.every == 0:
            self._run(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last iteration."""
        if self.after:
            self._run(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the workers that only benchmarks use."""
        for graders in self.graders.values():
            graders.close()
        self.graders.clear()

    def _resume(self, trainer: pl.Trainer) -> int:
        """Iteration of the last result that holds; a run from the start begins a new file."""
        step = trainer.global_step
        kept = [row for row in whole_rows(self.path) if step and row.get("iteration", step + 1) <= step]
        trainer.strategy.barrier("benchmarks")
        if trainer.is_global_zero and self.path.is_file():
            replace_rows(self.path, kept)
        for row in kept:
            self._publish(trainer, row)
        return max((row["iteration"] for row in kept), default=-1)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._done == trainer.global_step:
            return
        self._done = trainer.global_step
        pl_module.send_weights()  # type: ignore[operator]
        with isolate_rng(), torch.no_grad():
            for benchmark, prompts in self.loaded:
                self._evaluate(trainer, pl_module, benchmark, prompts)

    def _sampling(self, benchmark: Benchmark) -> Sampling:
        """The benchmark's, with the mask that training has."""
        return self.data_module.masked(benchmark.sampled(max_tokens=self.max_tokens))

    def _evaluate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, benchmark: Benchmark, prompts: Prompts
    ) -> None:
        begun, source = time.perf_counter(), self.data_module.source(prompts)
        sampling = self._sampling(benchmark)
        place = benchmark.place(self.template)
        if place not in self.graders:
            self.graders[place] = source.verifiers.answering(place)
        scores = Scores(benchmark.metrics, sampling.samples, prompts.kind, place, pl_module.device)
        draws = range(trainer.global_rank, benchmark.size(prompts, self.limit), trainer.world_size)
        self.tally, mine = Tally(len(draws), f"evaluating {benchmark.name}"), []
        for group in sampled(prompts, replace(source, verifiers=self.graders[place]), sampling, draws):
            scores.add(group)
            mine.append(group)
            self.tally.accepted += 1
        self.tally = None
        row = {
            "iteration": trainer.global_step,
            "benchmark": benchmark.name,
            "samples": sampling.samples,
            **scores.result(),
            "seconds": time.perf_counter() - begun,
            "version": source.engine.version,
        }
        everyone = _gather(trainer, mine)
        row["not_asked"] = not_asked(benchmark.title, everyone) if trainer.is_global_zero else {}
        self._publish(trainer, row)
        if trainer.is_global_zero:
            self._write(trainer, row, everyone)

    def _publish(self, trainer: pl.Trainer, row: Row) -> None:
        """Where `ModelCheckpoint` and `EarlyStopping` look."""
        named = {f"{row['benchmark']}/{name}": value for name, value in row["metrics"].items() if value is not None}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})

    def _write(self, trainer: pl.Trainer, row: Row, groups: list[list[Row]]) -> None:
        name, iteration = row["benchmark"], row["iteration"]
        if all_empty(groups):
            warnings.warn(f"All completions of {name} are empty after {iteration} iterations.", stacklevel=2)
        numbers = {f"{name}/{metric}": value for metric, value in row["metrics"].items()}
        numbers |= {f"{name}/{metric}_stderr": value for metric, value in row["stderr"].items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=iteration)
        samples = (sample for group in groups for sample in group)
        replace_rows(self.folder / "benchmarks" / name / f"{iteration}.jsonl", samples)
        append_rows(self.path, [row])


def _gather(trainer: pl.Trainer, mine: list[list[Row]]) -> list[list[Row]]:
    """The samples of all ranks, in the order of the problems."""
    if trainer.world_size == 1:
        return mine
    parts: list[list[list[Row]]] = of_all_ranks(mine)
    return sorted((group for part in parts for group in part), key=lambda group: group[0]["draw"])
