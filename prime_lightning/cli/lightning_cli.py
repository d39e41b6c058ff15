"""LightningCLI over PRIME's modules, and what a finished run says last.

`fit`, `validate`, `test` and `predict` are LightningCLI's, over `PrimeModule` and `RolloutDataModule`; the names in
`TRAINED` are its `fit` over other modules. Configurations are layered: `--config a.yaml --config b.yaml
--model.seed 3`, later wins, and `${...}` is resolved after all of them.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from omegaconf import OmegaConf

from prime_lightning.cli.usage import ShortErrors
from prime_lightning.models.options import cpu_precision, precision_of
from prime_lightning.prm.train import LabelledDataModule, PRMModule
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.callbacks.alarms import Alarms
from prime_lightning.training.callbacks.outputs import HuggingFaceExport, RolloutLog
from prime_lightning.training.callbacks.progress import PrimeProgress
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.sft import LessonDataModule, SFTModule
from prime_lightning.training.strategies.watch import RankWatch

MEANT_AS_IT_IS = (
    "LightningCLI's args parameter",  # `main` is its only caller
    "Using ModelCheckpoint with manual optimization",  # checkpoints are of finished iterations
    "Total length of `list` across ranks is zero",  # no validation
    ".*LeafSpec",  # between lightning and torch
)
TRAINED = {
    "sft": (SFTModule, LessonDataModule),
    "prm": (PRMModule, LabelledDataModule),
}
"""LightningCLI's `fit` over other modules than PRIME's."""


class PrimeParser(ShortErrors, LightningArgumentParser):  # type: ignore[misc]
    """LightningCLI's parser with short errors."""


class PrimeCLI(LightningCLI):
    """LightningCLI with layered configs, the package's callbacks, and errors without tracebacks."""

    def __init__(
        self,
        model: type[pl.LightningModule],
        data: type[pl.LightningDataModule],
        args: Sequence[str],
        *,
        command: Sequence[str] = (),
        run: bool = True,
    ) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        OmegaConf.register_resolver("cpu_precision", lambda: cpu_precision(), replace=True)
        for message in MEANT_AS_IT_IS:
            warnings.filterwarnings("ignore", message=message)
        self.command, self.asked = command or args, next(iter(args), "")
        super().__init__(
            model,
            data,
            args=list(args),
            run=run,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_class=PrimeParser,
            parser_kwargs={"parser_mode": "omegaconf+"},
            trainer_defaults={
                "callbacks": [PrimeProgress(), RankWatch()],
                "plugins": [{"class_path": "prime_lightning.training.strategies.checkpoint.AtomicCheckpointIO"}],
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "max_epochs": 1,
            },
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """No options by their first letters: a misspelt one is to be an error, not another one."""
        return super().init_parser(**{"allow_abbrev": False, **kwargs})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that is asked for: Lightning makes a parser of all options for each."""
        known = super().subcommands()
        return {self.asked: known[self.asked]} if self.asked in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data module samples from, and tokenizes for, the policy, or the one model that is trained."""
        parser.link_arguments(f"model.{getattr(self._model_class, 'policy_role', 'policy')}", "data.model")
        if issubclass(self._model_class, PrimeModule):  # type: ignore[arg-type]
            parser.add_lightning_class_args(Alarms, "alarms")

    def instantiate_classes(self) -> None:
        """Tell the module what started the run; model cards say it."""
        super().instantiate_classes()
        self.model.command = shlex.join(["prime-lightning", *self.command])

    def instantiate_trainer(self, **options: Any) -> pl.Trainer:
        """Put the progress bars first, which are to be there before another callback begins long work.

        A precision that no run may have is refused here, before an engine starts.
        """
        precision_of(self._get(self.config_init, "trainer").precision)
        trainer = super().instantiate_trainer(**options)
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, PrimeProgress))  # type: ignore[attr-defined]
        return trainer

    def after_fit(self) -> None:
        """Say where everything is."""
        if self.trainer.is_global_zero:
            print("\n".join(last_lines(self.trainer, self.command[0])), flush=True)

    def _parse_ckpt_path(self) -> None:
        """Keep what the user wrote: Lightning would overwrite it with the checkpoint's hyper-parameters, silently."""


def lightning(args: list[str]) -> PrimeCLI:
    """Run one of LightningCLI's subcommands, or one of `TRAINED`."""
    if args[0] in TRAINED:
        model, data = TRAINED[args[0]]
        return PrimeCLI(model, data, ["fit", *args[1:]], command=args)
    return PrimeCLI(PrimeModule, RolloutDataModule, args)


class _ParsedOnly(PrimeCLI):
    def instantiate_classes(self) -> None:
        """Leave everything as it was read."""


def parsed(args: Sequence[str]) -> Namespace:
    """The configuration of `fit`, all layers merged, checked and resolved; nothing of it is built."""
    return _ParsedOnly(PrimeModule, RolloutDataModule, args, run=False).config


COMMANDS = {
    "policy": "prime-lightning evaluate --model {path} --benchmark math500",
    "prm": "prime-lightning score --prm.folder {path} --input ROWS.jsonl --out scored.jsonl",
}


def last_lines(trainer: pl.Trainer, command: str) -> Iterator[str]:
    """The lines of `fit`, `sft` and `prm`.

    Args:
        trainer: It has finished.
        command: Which of them it was.
    """
    root = Path(trainer.default_root_dir)
    yield f"Run: {root}"
    exports = [callback for callback in trainer.callbacks if isinstance(callback, HuggingFaceExport)]  # type: ignore[attr-defined]
    for role, path in ((role, export.folder / role) for export in exports for role in export.roles):
        if path.is_dir():
            yield f"  {role}: {path}"
            yield f"    {COMMANDS[role].format(path=shlex.quote(str(path)))}"
            if command == "sft":
                yield f"    prime-lightning fit --config ... --model.policy {shlex.quote(str(path))}"
    if any(isinstance(callback, RolloutLog) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        yield "  curves, health, and credit token by token:"
        yield f"    prime-lightning report {shlex.quote(str(root))}"
    saved = trainer.checkpoint_callback
    last = saved.last_model_path if isinstance(saved, ModelCheckpoint) else ""
    if last:
        yield "  to go on, with more `--trainer.max_steps`:"
        yield f"    prime-lightning {command} --config ... --ckpt_path {shlex.quote(str(last))}"
