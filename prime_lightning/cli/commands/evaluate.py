"""`prime-lightning evaluate`: benchmarks of a model, or of completions that were made elsewhere.

Writes `results.json`, `results.md` and the samples of each benchmark into a folder of the model's own, and goes on
where it stopped when it is started again.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prime_lightning.cli.usage import TypedParser
from prime_lightning.engines import Engine
from prime_lightning.evaluation.benchmark import Benchmark, benchmark_names, load_benchmark
from prime_lightning.evaluation.folder import ResultsFolder, file_digest, fingerprint, table
from prime_lightning.evaluation.runner import Scores, all_empty, graded, not_asked, read_completions, sampled
from prime_lightning.models.pretrained import load_tokenizer, plain_folder, warn_of_padding
from prime_lightning.prompts.dataset import Prompts
from prime_lightning.rollout import Sampling
from prime_lightning.rollout.files import Row
from prime_lightning.sampling.loader import RolloutSource
from prime_lightning.training.callbacks.heartbeat import Heartbeat, minutes
from prime_lightning.verifiers import MathOptions, Verifiers

HF_ENGINE = "prime_lightning.engines.hf.HFEngine"


def parser() -> ArgumentParser:
    """Options of the command."""
    made = TypedParser(prog="prime-lightning evaluate", description=__doc__)
    made.add_argument("--model", type=str, required=True, help="Hugging Face folder or id")
    made.add_argument("--benchmark", nargs="+", type=str, required=True, help=f"YAML files, or {benchmark_names()}")
    made.add_argument(
        "--engine", type=Engine | None, default={"class_path": HF_ENGINE}, help="What samples: an import path."
    )
    made.add_argument("--data", type=str, help="Local file with the rows of the (one) benchmark.")
    made.add_argument("--completions", type=str, help="Grade this jsonl file (`id` or `draw`, `completion`).")
    made.add_argument("--out", type=str, help="Folder of the results; by default runs/evaluate/<model>.")
    made.add_argument("--limit", type=int, help="Only the first problems.")
    made.add_argument("--template", type=str, default="prime", help="Prompt template: prime, chat or base.")
    made.add_argument("--chat", type=bool, default=True, help="Use the chat template; false for base models.")
    made.add_argument(
        "--chat_template_kwargs",
        type=dict[str, Any],
        default={},
        help="Of the chat template: {enable_thinking: false}.",
    )
    for name in ("samples", "max_tokens", "top_k", "seed"):
        made.add_argument(f"--{name}", type=int, help="Instead of the benchmark's own.")
    for name in ("temperature", "top_p"):
        made.add_argument(f"--{name}", type=float, help="Instead of the benchmark's own.")
    made.add_argument("--math.answer", type=str, help="boxed, final or anywhere, instead of the benchmark's own.")
    made.add_argument("--mask_padding", type=bool | None, help="Never draw ids without a token.")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Processes that grade.")
    made.add_argument("--allow-unsafe-sandbox", action="store_true", help="Run programs without a sandbox that holds.")
    return made


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0, whatever the results."""
    made = parser()
    parsed = made.parse_args(args)
    options = made.instantiate(parsed)
    if options.data is not None and len(options.benchmark) > 1:
        raise ValueError(f"Expected one benchmark with --data, got {options.benchmark}.")
    if options.completions is not None and len(options.benchmark) > 1:
        raise ValueError(f"Expected one benchmark with --completions, got {options.benchmark}.")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"Expected a --limit of at least 1, got {options.limit}.")
    if options.engine is None and options.completions is None:
        raise ValueError("Expected an --engine to sample with, or --completions to grade, got neither.")
    out = options.out or default_folder(options.model)
    workers = Verifiers(workers=options.workers, allow_unsafe_sandbox=options.allow_unsafe_sandbox)
    folder = ResultsFolder(out, options.model, fingerprint(options.model))
    with closing(folder), workers as verifiers, ExitStack() as stack:
        todo = [Evaluation(name, options, folder) for name in options.benchmark]
        with engine_of(options, todo, verifiers) as source:
            for evaluation in todo:
                evaluation.run(source, stack.enter_context(verifiers.answering(evaluation.answer)))
    sys.stdout.write(table({"model": options.model, "benchmarks": {e.benchmark.name: e.result for e in todo}}))
    print(f"\nEverything: {out}\n  answers and verdicts, one by one: {folder.samples(todo[0].benchmark.name)}")
    return 0


def default_folder(model: str) -> str:
    """Where the results of a model go.

    Example:
        >>> default_folder("org/model")
        'runs/evaluate/org--model'
    """
    return f"runs/evaluate/{re.sub(r'[^A-Za-z0-9.-]+', '--', model.strip('/'))}"


class Evaluation:
    """One benchmark of one call; everything that can be wrong with its settings is found when it is made."""

    def __init__(self, name: str, options: Namespace, folder: ResultsFolder) -> None:
        self.options, self.folder = options, folder
        self.benchmark: Benchmark = load_benchmark(name)
        self.prompts: Prompts = self.benchmark.load(
            data=options.data,
            template=options.template,
            chat=options.chat,
            chat_template_kwargs=options.chat_template_kwargs,
        )
        self.answer = MathOptions(answer=options.math.answer or self.benchmark.place(options.template)).answer
        self.problems = self.benchmark.size(self.prompts, options.limit)
        changed = ("samples", "max_tokens", "top_k", "seed", "temperature", "top_p", "mask_padding")
        self.sampling: Sampling = self.benchmark.sampled(**{key: options[key] for key in changed})
        self.given: dict[int, Any] = {}
        if options.completions is not None:
            rows = self.benchmark.size(self.prompts, None)
            self.given = read_completions(options.completions, self.prompts, self.problems, rows)
            self.sampling = self.benchmark.sampled(samples=len(self.given[0]))
        self.done = folder.begin(self.benchmark.name, self.settings(), self.sampling.samples)
        self.result: dict[str, Any] = {}

    @property
    def missing(self) -> list[int]:
        """Problems that are not done."""
        return [draw for draw in range(self.problems) if draw not in self.done]

    def settings(self) -> dict[str, Any]:
        """What must be equal for results to belong together."""
        rows = self.benchmark.prompts
        local = self.options.data or rows.get("init_args", {}).get("path")
        own = {"limit": self.options.limit, "prompts": rows, "data": file_digest(local)}
        own |= {"answer": self.answer} if self.answer != "boxed" else {}
        if self.given:
            return {**own, "completions": file_digest(self.options.completions)}
        name, engine = self.options.template, type(self.options.engine)
        template = {key: value for key, value in asdict(self.benchmark.template(name)).items() if value not in ({}, ())}
        variables = self.options.chat_template_kwargs
        return {
            **own,
            "template": {"name": name, **template},
            "chat": self.options.chat,
            **({"chat_template_kwargs": variables} if variables else {}),
            "sampling": {key: value for key, value in asdict(self.sampling).items() if key != "mask_padding" or value},
            "engine": f"{engine.__module__}.{engine.__qualname__}",
        }

    def run(self, source: RolloutSource | None, verifiers: Verifiers) -> None:
        """Sample and grade what is missing, then write the numbers of all of it.

        Raises:
            ValueError: if the model gave nothing but its end token, for every problem.
        """
        begun, name = time.perf_counter(), self.benchmark.name
        for group in shown(self.benchmark.title, self.problems, len(self.done), self._groups(source, verifiers)):
            self.folder.add(name, group)
            self.done[group[0]["draw"]] = group
        if all_empty(self.done.values()):
            raise ValueError(
                f"Expected answers to {self.benchmark.title}, got {self.problems * self.sampling.samples} empty "
                f"completions: the model gives nothing but its end token, or other special ones. Check --template, "
                f"--chat and the model; the samples are in {str(self.folder.samples(name))!r}."
            )
        scores = Scores(self.benchmark.metrics, self.sampling.samples, self.prompts.kind, self.answer)
        for draw in range(self.problems):
            scores.add(self.done[draw])
        self.result = {
            "title": self.benchmark.title,
            "samples": self.sampling.samples,
            **scores.result(),
            "not_asked": not_asked(self.benchmark.title, self.done.values()),
            "seconds": time.perf_counter() - begun,
            **self.settings(),
        }
        self.folder.finish(name, self.result)

    def _groups(self, source: RolloutSource | None, verifiers: Verifiers) -> Iterator[list[Row]]:
        if source is None:
            return graded(self.prompts, verifiers, {draw: self.given[draw] for draw in self.missing if self.given})
        return sampled(self.prompts, replace(source, verifiers=verifiers), self.sampling, self.missing)


@contextmanager
def engine_of(options: Namespace, todo: Sequence[Evaluation], verifiers: Verifiers) -> Iterator[RolloutSource | None]:
    """The model, loaded, while it is needed; None where nothing has to be sampled."""
    if options.completions is not None or not any(evaluation.missing for evaluation in todo):
        yield None
        return
    tokenizer = load_tokenizer(options.model)
    if not all(evaluation.sampling.mask_padding for evaluation in todo):
        warn_of_padding(options.model, tokenizer)
    for evaluation in todo:
        evaluation.prompts.prompt(0, tokenizer)  # template and chat template must agree, before the model is loaded
    for line in announced(options.engine, todo):
        print(line, file=sys.stderr, flush=True)
    try:
        with plain_folder(options.model) as model:
            options.engine.start(model)
        source = RolloutSource(prompts=todo[0].prompts, tokenizer=tokenizer, engine=options.engine, verifiers=verifiers)
        for evaluation in todo:
            source.longest_prompt(evaluation.sampling)  # of the last benchmark, too, before the first one runs
        yield source
    finally:
        options.engine.close()


def announced(engine: Engine, todo: Sequence[Evaluation]) -> Iterator[str]:
    """What will be sampled, a line a benchmark, and what would be faster."""
    for evaluation in todo:
        asked, sampling = len(evaluation.missing), evaluation.sampling
        of = "" if asked == evaluation.problems else f" (of {evaluation.problems}; the others are done)"
        answers = f"{sampling.samples} answer{'s' * (sampling.samples > 1)}"
        yield (
            f"{evaluation.benchmark.title}: {asked} problems{of}, {answers} each of at most "
            f"{sampling.max_tokens} tokens, by {type(engine).__name__}"
        )
    if f"{type(engine).__module__}.{type(engine).__qualname__}" == HF_ENGINE:
        yield "If it takes long: vLLM is faster with larger models (--engine prime_lightning.engines.vllm.VLLMEngine)"


def shown(title: str, total: int, done: int, groups: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """The same groups, with a bar where there is a terminal, and a line a minute elsewhere."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    begun, before, quiet = time.monotonic(), done, console.is_terminal

    def said() -> str:
        gone = time.monotonic() - begun
        left = f", about {minutes(gone / (done - before) * (total - done))} left" if done > before else ""
        return "" if quiet else f"{title}: {done} of {total} problems, {minutes(gone)} gone{left}"

    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, Heartbeat(said):
        bar = progress.add_task(title, total=total, completed=done)
        for group in groups:
            yield group
            done += 1
            progress.advance(bar)
