"""PRIME by one call, from a script or a notebook: `train`, `evaluate`, `score` and `rerank`.

Each builds the arguments of the command of its name, prints it, and runs it: there is one parser and one truth, and
every call can be repeated from a shell.
"""

from __future__ import annotations

import dataclasses
import html
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prime_lightning.cli.call_config import (
    Reward,
    call_layer,
    first_rank,
    lower_layers,
    plain,
    take_back,
    wait_for,
    write,
    write_rows,
)
from prime_lightning.cli.commands import evaluate as evaluation
from prime_lightning.cli.commands import rerank as reranking
from prime_lightning.cli.commands import score as scoring
from prime_lightning.cli.lightning_cli import lightning
from prime_lightning.models.prm_folder import claim
from prime_lightning.models.third_party_bars import quiet_libraries
from prime_lightning.report.page import write_report
from prime_lightning.rollout.files import read_rows

if TYPE_CHECKING:
    import datasets
    import pandas


class Run:
    """A run's folder, and what is in it.

    Args:
        folder: The run's `trainer.default_root_dir`.

    Example:
        >>> Run("runs/train").policy
        'runs/train/policy'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def policy(self) -> str:
        """The trained policy, as `AutoModelForCausalLM.from_pretrained` and `train` take it."""
        return str(self.folder / "policy")

    @property
    def prm(self) -> str:
        """The trained process reward model, as `ImplicitPRM.from_pretrained` takes it."""
        return str(self.folder / "prm")

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row an iteration, a column a metric."""
        import pandas

        from prime_lightning.report.runs import read_run

        rows = read_run(self.folder).rows
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("iteration").sort_index()

    def report(self) -> Page:
        """Write `report.html`; a notebook shows it."""
        return Page(write_report([self.folder], self.folder / "report.html"))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


@dataclasses.dataclass(frozen=True)
class Page:
    """A page on disk, which notebooks show in place.

    Example:
        >>> str(Page(Path("report.html")))
        'report.html'
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        inside = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{inside}" style="width: 100%; height: 50em; border: 0"></iframe>'


def train(
    model: str,
    dataset: str | Sequence[Mapping[str, Any]] | datasets.Dataset,
    reward: Reward | str | None = None,
    *,
    prm: str | None = "same",
    config: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = (),
    folder: str | Path = "runs/train",
    **overrides: Any,
) -> Run:
    """Train a model by PRIME; the same as `prime-lightning fit` with the layers that it prints.

    Args:
        model: Hugging Face id or folder of the policy.
        dataset: Rows, each with a `problem` (or a `prompt` of chat messages) and an `answer` or tests; or a file, or
            a hub id.
        reward: A function `(prompt, completion, row) -> score` from 0 to 1; or a verifier's name (`math`, `code`,
            `exact`, an import path). By default `code` where rows have tests, else `math`.
        prm: What the process reward model starts from: `same` as the policy, a folder or id, or None for outcome
            rewards alone.
        config: Further layers over conf/train.yaml: YAML files, or mappings like them.
        folder: New folder of the run.
        **overrides: Options by name: of the trainer (`max_steps=20`), the module, the data module
            (`sampling={"samples": 8}`) or of the data set (`template=`, `columns=`). A mapping changes only the
            options that it names.

    Returns:
        The run: its models, metrics and report.

    Raises:
        ValueError: if the folder has files in it, an option is unknown, or a value cannot stand in YAML.

    Example:
        >>> rows = [{"problem": "What is 3 + 4?", "answer": "7"}]
        >>> run = train("Qwen/Qwen2.5-0.5B-Instruct", rows, max_steps=20)  # doctest: +SKIP
    """
    out = Path(folder)
    if first_rank():
        claim(out).mkdir(parents=True, exist_ok=True)
    sys.path.append(str(out.resolve()))  # of the reward
    try:
        words = _layers(out, config, (model, dataset, reward, prm, overrides))
        _run("fit", words, lightning, before=f"PYTHONPATH={shlex.quote(str(out))} " if callable(reward) else "")
    except Exception:
        take_back(out)  # what is mended can be tried again in the same folder
        raise
    finally:
        sys.path.remove(str(out.resolve()))
    return Run(out)


def _layers(out: Path, config: Any, call: tuple[Any, ...]) -> list[str]:
    """The arguments of `fit` that name all layers, the call's own last."""
    layer = out / "call.yaml"
    if first_rank():
        write(layer, call_layer(out, *call))
    layers = lower_layers(config, out)
    wait_for(layer)
    return [word for each in [*layers, str(layer)] for word in ("--config", each)]


def evaluate(model: str, benchmark: str | Sequence[str], **options: Any) -> dict[str, Any]:
    """Benchmarks of a model: `prime-lightning evaluate`.

    Args:
        model: Hugging Face id or folder.
        benchmark: Names or YAML files.
        **options: Of the command: `limit=100`, `samples=4`, `engine={"class_path": ...}`.

    Returns:
        Results by benchmark: metrics, intervals, settings.

    Raises:
        ValueError: if an option cannot work.
    """
    names = [benchmark] if isinstance(benchmark, str) else list(benchmark)
    folder = Path(options.pop("out", None) or evaluation.default_folder(model))
    words = ["--model", model, "--benchmark", *names, "--out", str(folder), *_words(options)]
    _run("evaluate", words, lambda args: evaluation.main(args[1:]))
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["benchmarks"]
    return {name: result for name, result in results.items() if name in {Path(n).stem for n in names}}


def score(prm: str, rows: Sequence[Mapping[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Rewards of tokens, steps and responses by a PRM: `prime-lightning score`.

    Args:
        prm: Folder or id.
        rows: With `prompt` and `response`, or `responses`.
        **options: Of the command: `detail="step"`.

    Returns:
        The rows, with their rewards.

    Raises:
        ValueError: if a row lacks what is scored.
    """
    with tempfile.TemporaryDirectory() as place:
        write_rows(Path(place) / "rows.jsonl", rows)
        files = ["--input", f"{place}/rows.jsonl", "--out", f"{place}/scored.jsonl"]
        _run("score", ["--prm.folder", prm, *files, *_words(options)], lambda args: scoring.main(args[1:]))
        return [row for _, row in read_rows(Path(place) / "scored.jsonl")]


def rerank(prm: str, rows: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
    """Best-of-n by a PRM against majority vote and pass@n: `prime-lightning rerank`.

    Args:
        prm: Folder or id.
        rows: With `prompt`, `response`, and `label` or `answer`.
        **options: Of the command: `n=[1, 4, 16]`.

    Returns:
        What the command writes to `results.json`.

    Raises:
        ValueError: if there is neither a label nor an answer to grade against.
    """
    with tempfile.TemporaryDirectory() as place:
        write_rows(Path(place) / "rows.jsonl", rows)
        files = ["--input", f"{place}/rows.jsonl", "--out", f"{place}/out"]
        _run("rerank", ["--prm.folder", prm, *files, *_words(options)], lambda args: reranking.main(args[1:]))
        result: dict[str, Any] = json.loads((Path(place) / "out" / "results.json").read_text(encoding="utf-8"))
        return result


def _run(command: str, words: list[str], main: Callable[[list[str]], Any], *, before: str = "") -> None:
    quiet_libraries()
    print(f"$ {before}prime-lightning {shlex.join([command, *words])}", flush=True)
    try:
        main([command, *words])
    except SystemExit as end:  # a parser's, which has said what is wrong
        if end.code:
            raise ValueError(f"`prime-lightning {command}` does not take these options; see above.") from None


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options of a command as its arguments."""
    words = []
    for name, value in options.items():
        said = plain(value)
        words += [f"--{name}", said if isinstance(said, str) else json.dumps(said)]
    return words
