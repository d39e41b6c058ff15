"""What a PRM's weights do not say: beta, the reference it is compared with, where steps end: a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prime_lightning.prm.steps import StepRule

FILE = "implicit_prm.json"


@dataclass(frozen=True, kw_only=True)
class PRMFacts:
    """The facts of an implicit PRM: its reward is `beta * log(prm / reference)`, summed over the tokens of a step.

    Example:
        >>> PRMFacts(beta=0.05, reference="my/sft-model").steps.rule
        'blank_line'
    """

    beta: float
    """Reward per nat."""
    reference: str | None
    """Hub id or folder (relative to the PRM's own folder) of the reference; None if no model of its own was kept."""
    steps: StepRule = field(default_factory=StepRule)
    """Where steps end, unless the caller says otherwise."""
    loss: str = "prime_lightning.algorithms.ce"
    """Import path of what it was trained with; after CE, `sigmoid(reward)` is the chance of a right answer."""
    granularity: str = "token"
    """What was paid out in the run: each token, each step, or the response."""
    normalise: str = "none"
    """By what the run divided rewards before it used them; the rewards given here are never divided."""
    normalise_scale: float | None = None
    """The number that this was in the last iteration."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"Expected `beta` positive, got {self.beta}.")

    def write(self, folder: Path) -> None:
        """Write the JSON file into the PRM's folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def of_run(cls, run: Mapping[str, Any], reference: str | None) -> PRMFacts:
        """The facts of a training run, from what its module's `facts` says and its last numbers."""
        separator = run["step_separator"]
        return cls(
            beta=run["beta"],
            reference=reference,
            steps=StepRule() if separator == "\n\n" else StepRule(rule="text", separator=separator),
            loss=run["prm_loss"],
            granularity=run["granularity"],
            normalise=run["normalise"],
            normalise_scale=run.get("numbers", {}).get("process/scale"),
        )

    @classmethod
    def read(cls, folder: str | Path) -> PRMFacts:
        """Read the JSON file of a PRM's folder.

        Raises:
            ValueError: if it is missing, no JSON, or lacks or misspells a fact.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(
                f"Expected {FILE} in the PRM's folder {str(folder)!r}, which says its beta and reference, got none. "
                "Write the folder with `prime-lightning export --role prm`, or give beta and reference yourself: "
                "`ImplicitPRM.from_pretrained(folder, facts=PRMFacts(beta=..., reference=...))`, `--prm.facts.beta`."
            )
        try:
            row = json.loads(path.read_text())
            return cls(**{**row, "steps": StepRule(**row.get("steps", {}))})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"Expected the facts of a PRM in {str(path)!r}, got something else: {error}.") from error

    def reference_beside(self, folder: str | Path) -> str | None:
        """The reference's name; a folder is found from the PRM's own, so that both can be moved together."""
        if self.reference is None:
            return None
        beside = Path(folder) / self.reference
        return str(beside) if beside.is_dir() else self.reference
