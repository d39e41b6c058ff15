"""A benchmark as data: `evals/benchmarks/*.yaml`, or a file of one's own of the same form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from prime_lightning.evaluation.resources import resource
from prime_lightning.prompts.dataset import Prompts, Template
from prime_lightning.prompts.published import BenchmarkRows
from prime_lightning.rollout import Sampling

FOLDER = ("evals", "benchmarks")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is asked, how it is sampled, and what is reported.

    Example:
        >>> benchmark = load_benchmark("math500")
        >>> benchmark.title, benchmark.rows, benchmark.sampling.temperature
        ('MATH-500', 500, 0.0)
    """

    name: str
    """Of the file, without its ending; names metrics and files of samples."""
    title: str
    licence: str
    rows: int | list[int]
    """Rows that the data set must have (any of a list: published versions differ)."""
    prompts: dict[str, Any]
    """`class_path` and `init_args` of a `Prompts`; built when it is used, since that loads the data set."""
    templates: str | dict[str, Template]
    """By name; a string names a group of `evals/templates.yaml`."""
    sampling: Sampling = Sampling()
    answer: dict[str, str] = field(default_factory=dict)
    """Where answers of maths stand, by template: a value of `MathOptions.answer`; `boxed` for one that is not named."""
    metrics: list[str] = field(default_factory=lambda: ["math_accuracy"])
    """`evaluate` modules of `evals/metrics`, or paths of such; their first value is the headline."""

    def template(self, name: str) -> Template:
        """A prompt template by its name.

        Raises:
            ValueError: if there is none.
        """
        groups = self.templates if isinstance(self.templates, dict) else _templates(self.templates)
        if name not in groups:
            raise ValueError(f"Expected a template of {sorted(groups)} for the benchmark {self.name!r}, got {name!r}.")
        return groups[name]

    def place(self, template: str) -> str:
        """Where the answers to a prompt template stand: a value of `MathOptions.answer`.

        Example:
            >>> load_benchmark("math500").place("base"), load_benchmark("math500").place("prime")
            ('final', 'boxed')
        """
        return self.answer.get(template, "boxed")

    def load(
        self,
        *,
        data: str | None = None,
        template: str = "prime",
        chat: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Prompts:
        """The prompts, with their number checked.

        Args:
            data: A local file instead of the hub data set.
            template: Which prompt template.
            chat: Use the tokenizer's chat template; False for base models.
            chat_template_kwargs: Variables of the chat template, added to the template's own.

        Raises:
            ValueError: if the rows cannot be read, or their number is not that of the benchmark.
        """
        chosen = self.template(template)
        arguments = {**self.prompts.get("init_args", {})}
        made: type[Prompts] = _prompts_class(self.prompts["class_path"])
        if not issubclass(made, BenchmarkRows):
            if data is not None:
                raise ValueError(f"Expected no data file for {self.name!r}, whose problems are made up, got {data!r}.")
            return made(**arguments)
        if data is not None:
            arguments |= {"path": data, "name": None, "revision": None}
        variables = {**(chosen.chat_template_kwargs if chat else {}), **(chat_template_kwargs or {})}
        chosen = replace(chosen, chat=chat and chosen.chat, chat_template_kwargs=variables)
        rows = made(**arguments, source=self.name, template=chosen)
        allowed = self.rows if isinstance(self.rows, list) else [self.rows]
        if len(rows) not in allowed:
            raise ValueError(
                f"Expected {' or '.join(map(str, allowed))} rows of {self.title} in {arguments['path']!r}, got "
                f"{len(rows)}. Take the whole test split (`limit` takes the first of them)."
            )
        return rows

    def sampled(self, **changes: Any) -> Sampling:
        """The benchmark's sampling with some numbers changed; None leaves one as it is."""
        return replace(self.sampling, **{name: value for name, value in changes.items() if value is not None})

    def size(self, prompts: Prompts, limit: int | None) -> int:
        """How many problems are asked."""
        rows = len(prompts) if isinstance(prompts, BenchmarkRows) else self.rows
        assert isinstance(rows, int)
        return rows if limit is None else min(rows, limit)


def load_benchmark(name: str) -> Benchmark:
    """A shipped benchmark by its name, or one of a YAML file.

    Raises:
        ValueError: if there is none, or its file says something else than a benchmark.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else resource(*FOLDER) / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"Expected a benchmark of {benchmark_names()} or a YAML file, got {name!r}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Benchmark, "benchmark")
    try:
        parsed = parser.parse_object({"benchmark": {"name": path.stem, **yaml.safe_load(path.read_text())}})
    except (ArgumentError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"Expected a benchmark in {str(path)!r}: {error}") from error
    made: Benchmark = parser.instantiate(parsed).benchmark
    return made


def benchmark_names() -> list[str]:
    """The shipped benchmarks.

    Example:
        >>> "aime2024" in benchmark_names()
        True
    """
    return sorted(path.stem for path in resource(*FOLDER).glob("*.yaml"))


def _templates(group: str) -> dict[str, Template]:
    groups = yaml.safe_load(resource("evals", "templates.yaml").read_text())
    if group not in groups:
        raise ValueError(f"Expected a group of templates of {sorted(groups)}, got {group!r}.")
    return {name: Template(**fields) for name, fields in groups[group].items()}


def _prompts_class(path: str) -> type[Prompts]:

    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None) if module else None
    if not (isinstance(found, type) and issubclass(found, Prompts)):
        raise ValueError(f"Expected the import path of a subclass of Prompts, got {path!r}.")
    return found
