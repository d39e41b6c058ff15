"""Models as Hugging Face folders: weights, tokenizer, generation config, a model card, and for a PRM its JSON file."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import prime_lightning
from prime_lightning.models.pretrained import base_of, load_config, load_tokenizer
from prime_lightning.models.steps import StepRule

FILE = "implicit_prm.json"


@dataclass(frozen=True, kw_only=True)
class PRMConfig:
    """A PRM's JSON file. Its reward is `beta * log(prm / reference)`, summed over the tokens of a step.

    Example:
        >>> PRMConfig(beta=0.05, reference="my/sft-model").steps.rule
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
    def of_run(cls, run: Mapping[str, Any], reference: str | None) -> PRMConfig:
        """The configuration of the PRM of a training run, from its module's `metadata` and its last numbers."""
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
    def read(cls, folder: str | Path) -> PRMConfig:
        """Read the JSON file of a PRM's folder.

        Raises:
            ValueError: if it is missing, no JSON, or lacks or misspells a fact.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(
                f"Expected {FILE} in the PRM's folder {str(folder)!r}, which says its beta and reference, got none. "
                "Write the folder with `prime-lightning export --role prm`, or give beta and reference yourself: "
                "`ImplicitPRM.from_pretrained(folder, config=PRMConfig(beta=..., reference=...))`, `--prm.config.beta`."
            )
        try:
            row = json.loads(path.read_text())
            return cls(**{**row, "steps": StepRule(**row.get("steps", {}))})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Expected the configuration of a PRM in {str(path)!r}, got something else: {error}."
            ) from error

    def reference_beside(self, folder: str | Path) -> str | None:
        """The reference's name; a folder is found from the PRM's own, so that both can be moved together."""
        if self.reference is None:
            return None
        beside = Path(folder) / self.reference
        return str(beside) if beside.is_dir() else self.reference


WHAT = {
    "policy": "The policy: a causal language model that writes answers.",
    "prm": "An implicit process reward model: a causal language model whose log-probs, compared with those of its "
    "reference, are the reward of every token. It is not meant to write text.",
    "reference": "The reference of a run: the frozen model that the implicit process reward model is compared with.",
}
USE = {
    "prm": "from prime_lightning.prm import ImplicitPRM\n\n"
    'prm = ImplicitPRM.from_pretrained("{folder}")\n'
    "[scored] = prm.score([prompt], [response])  # token_rewards, step_rewards, reward",
}
USE_LM = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
    'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
)


def claim(folder: str | Path) -> Path:
    """A folder to write a model into: it must be new, or empty.

    Raises:
        ValueError: if there are files in it.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"Expected a new or empty folder to write a model into, got {str(folder)!r} with files in it.")
    return path


def write_model(
    folder: str | Path, source: str, weights: Iterable[tuple[str, Tensor]], *, dtype: str | None = None
) -> None:
    """Write weights as a Hugging Face folder, with the configuration and tokenizer of the model they started from.

    The folder appears whole or not at all. Nothing is copied that the given tensors do not already hold: the model is
    built without memory, and its files are written shard by shard.

    Args:
        folder: New, or empty.
        source: Hub id or folder of the model that training started from.
        weights: Names, as in that model, and tensors.
        dtype: Type to write; None keeps the tensors' own.

    Raises:
        ValueError: if the folder holds files, or the weights are not those of such a model.
    """
    target = claim(folder)
    state = {name: tensor.to(getattr(torch, dtype)) if dtype else tensor for name, tensor in weights}
    model = _skeleton(source, state)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=state)
        load_tokenizer(source).save_pretrained(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _skeleton(source: str, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model without memory, once its weights and the given ones are found to be the same."""
    config = load_config(source)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    own = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}  # tied ones once
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in own if given.get(name) != own[name])
    wrong += sorted(given.keys() - model.state_dict().keys())
    if wrong:
        raise ValueError(
            f"Expected the weights of {source!r}, got others in {len(wrong)} places ({', '.join(wrong[:3])} ...). "
            "Adapters have to be merged first."
        )
    model.config.dtype = next(iter(state.values())).dtype
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(base_of(source))
        except OSError:
            model.generation_config = GenerationConfig.from_model_config(config)
    return model


def describe(folder: str | Path, role: str, run: Mapping[str, Any], reference: str | None = None) -> None:
    """Add the model card, and for a PRM its JSON file.

    Args:
        folder: Of the model.
        role: `policy`, `prm` or `reference`.
        run: What `run_metadata` says of the run.
        reference: For a PRM, hub id or folder of its reference; by default the run's own.
    """
    path = Path(folder)
    if role == "prm":
        own = run["names"].get("reference")
        PRMConfig.of_run(run, relative(reference or own, path)).write(path)
    card(path, role, run).save(path / "README.md")


def relative(reference: str | None, folder: Path) -> str | None:
    """A folder as seen from the PRM's own folder; hub ids stay what they are."""
    if reference is None or not Path(reference).is_dir():
        return reference
    return os.path.relpath(Path(reference).resolve(), folder.resolve())


def card(folder: Path, role: str, run: Mapping[str, Any]) -> ModelCard:
    """The model card: what it is, what made it, its run's numbers, how to load it."""
    start = run["names"].get(role)
    base = start if start and not Path(start).is_dir() else None
    data = ModelCardData(
        base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=["prime", role]
    )
    numbers = {name: value for name, value in sorted(run["numbers"].items()) if not name.startswith("time/")}
    table = "\n".join(f"| {name} | {value:.6g} |" for name, value in numbers.items() if math.isfinite(value))
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {folder.resolve().name}",
        WHAT[role],
        f"Of a run of prime_lightning {prime_lightning.__version__} that started this model from `{start}`, after "
        f"{run['iterations']} iterations:",
        f"```bash\n{run['command'] or '(not started by a command)'}\n```",
        f"The last numbers of the run:\n\n| name | value |\n|---|---|\n{table}" if table else "It logged no numbers.",
        f"```python\n{USE.get(role, USE_LM).format(folder=folder)}\n```",
    ]
    return ModelCard("\n\n".join(parts) + "\n", ignore_metadata_errors=True)
