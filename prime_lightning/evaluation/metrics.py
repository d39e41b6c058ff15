"""Metrics of a benchmark: local Hugging Face `evaluate` modules.

A metric gives numbers for one problem from its graded samples. The modules stand in `evals/metrics/`; a user's own is
the path of such a folder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import datasets
import evaluate

from prime_lightning.evaluation.resources import resource
from prime_lightning.evaluation.statistics import mean_and_error
from prime_lightning.rollout import Prompt
from prime_lightning.verifiers import Verifiers


class ProblemMetric(evaluate.Metric):  # type: ignore[misc]
    """An `evaluate` metric over problems with several samples each, graded by `prime_lightning.verifiers`.

    A subclass says what it is (`about`) and what it gives for one problem (`problem`).
    """

    about: str
    """Description, for `evaluate`."""
    kind: str = "math"
    """Verifier of the predictions, which also says where their final answers stand."""
    answer: str = "boxed"
    """The same for maths: a value of `MathOptions.answer`."""

    @abstractmethod
    def problem(self, texts: Sequence[str], scores: Sequence[float | None]) -> dict[str, float]:
        """Values of one problem.

        Args:
            texts: `[K]` completions.
            scores: `[K]` verdicts in [0, 1]; None where unknown.
        """

    def _info(self) -> evaluate.MetricInfo:
        predictions = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=self.about,
            citation="",
            inputs_description="predictions: the completions of each problem; references: its answer, or its tests.",
            features=datasets.Features({"predictions": predictions, "references": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[str],
        kind: str | None = None,
        scores: Sequence[Sequence[float | None]] | None = None,
    ) -> dict[str, float]:
        """Means over the problems; `scores` are verdicts that are there already."""
        self.kind = kind or type(self).kind
        graded = scores or grade(predictions, references, self.kind)
        values = [self.problem(texts, known) for texts, known in zip(predictions, graded, strict=True)]
        return {name: mean_and_error([row[name] for row in values])[0] for name in values[0]}


def grade(predictions: Sequence[Sequence[str]], references: Sequence[str], kind: str) -> list[list[float | None]]:
    """Scores of completions by the training reward's own verifiers; None where unknown.

    Example:
        >>> grade([["#7", "#8"]], ["7"], "exact")
        [[1.0, 0.0]]
    """
    prompts = [Prompt(draw=i, token_ids=(), text="", kind=kind, answer=a) for i, a in enumerate(references)]
    pairs = [(prompt, text) for prompt, texts in zip(prompts, predictions, strict=True) for text in texts]
    with Verifiers() as verifiers:
        verdicts = verifiers.map(pairs)
        return [[v.known_score for _, v in zip(texts, verdicts, strict=False)] for texts in predictions]


def load_metric(name: str, kind: str | None = None, answer: str = "boxed") -> ProblemMetric:
    r"""A shipped metric by its name, or a user's own by the path of its folder; for predictions of a kind.

    Raises:
        ValueError: if there is none.

    Example:
        >>> load_metric("math_accuracy").problem([r"\boxed{1}", "two"], [1.0, 0.0])
        {'avg2': 0.5}
    """
    folder = Path(name) if "/" in name else resource("evals", "metrics", name)
    script = folder / f"{folder.name}.py"
    if not script.is_file():
        known = sorted(p.name for p in resource("evals", "metrics").iterdir())
        raise ValueError(f"Expected a metric of {known} or a folder with {script.name}, got {name!r}.")
    loaded = evaluate.load(str(folder), keep_in_memory=True)
    if not isinstance(loaded, ProblemMetric):
        raise ValueError(
            f"Expected the metric {name!r} to be a subclass of prime_lightning.evaluation.metrics.ProblemMetric, "
            f"got {type(loaded).__name__}."
        )
    loaded.kind, loaded.answer = kind or loaded.kind, answer
    return loaded


def known_scores(scores: Sequence[float | None]) -> list[float]:
    """Scores without the unknown ones."""
    return [score for score in scores if score is not None]
