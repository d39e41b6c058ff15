"""The `prime-lightning` command.

`fit`, `validate`, `test` and `predict` are LightningCLI's, over `PrimeModule` and `RolloutDataModule`; `sft` is its
`fit` over the supervised warm start. `quickstart` runs them one after another, and `verify` grades a file.
Configurations are layered: `--config a.yaml --config b.yaml --model.seed 3`, later wins, and `${...}` is resolved after
all of them.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from omegaconf.errors import OmegaConfBaseException

from prime_lightning.callbacks import PrimeProgress
from prime_lightning.data import RolloutDataModule
from prime_lightning.module import PrimeModule
from prime_lightning.sft import LessonDataModule, SFTModule
from prime_lightning.verifiers import SandboxLeaks

MEANT_AS_IT_IS = (
    "LightningCLI's args parameter",  # `main` is its only caller
    "Using ModelCheckpoint with manual optimization",  # checkpoints are of finished iterations
    "Total length of `list` across ranks is zero",  # no validation
    ".*LeafSpec",  # between lightning and torch
)
TRACEBACK = "PRIME_LIGHTNING_TRACEBACK"
USAGE = """prime-lightning: train reasoning models with PRIME

  prime-lightning quickstart [--out DIR] [--seed N]   a tiny model learns arithmetic, on a CPU, in minutes
  prime-lightning fit --config FILE [--config ...]    train by PRIME
  prime-lightning sft --config FILE                   supervised warm start
  prime-lightning validate | test | predict           sample, grade, score
  prime-lightning verify --kind math|code ...         grade a file of completions

`prime-lightning fit --help` lists every option."""


class PrimeCLI(LightningCLI):
    """LightningCLI with layered configs, the package's callbacks, and errors without tracebacks."""

    def __init__(
        self,
        model: type[pl.LightningModule],
        data: type[pl.LightningDataModule],
        args: Sequence[str],
        *,
        run: bool = True,
    ) -> None:
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        for message in MEANT_AS_IT_IS:
            warnings.filterwarnings("ignore", message=message)
        super().__init__(
            model,
            data,
            args=list(args),
            run=run,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+"},
            trainer_defaults={
                "callbacks": [PrimeProgress()],
                "plugins": [{"class_path": "prime_lightning.checkpoint.AtomicCheckpointIO"}],
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "max_epochs": 1,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data module samples from, and tokenizes for, the policy."""
        parser.link_arguments("model.policy", "data.model")

    def _parse_ckpt_path(self) -> None:
        """Keep what the user wrote: Lightning would overwrite it with the checkpoint's hyper-parameters, silently."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status: 0, or 2 if what the user gave cannot work or the run had to stop."""
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        return _run(command, arguments[1:])
    except (ValueError, OSError, FloatingPointError, MisconfigurationException, SandboxLeaks) as error:
        if os.environ.get(TRACEBACK):
            raise
        return _complain(error)
    except OmegaConfBaseException as error:
        return _complain(f"A ${{...}} in the configuration leads nowhere: {error}")


def _run(command: str, rest: list[str]) -> int:
    if command == "quickstart":
        from prime_lightning.quickstart import main as quickstart

        return quickstart(rest, lightning)
    if command == "verify":
        from prime_lightning.verifiers.command import main as verify

        return verify(rest)
    lightning([command, *rest])
    return 0


def lightning(args: list[str]) -> PrimeCLI:
    """Run one of LightningCLI's subcommands, or `sft`."""
    if args[0] == "sft":
        return PrimeCLI(SFTModule, LessonDataModule, ["fit", *args[1:]])
    return PrimeCLI(PrimeModule, RolloutDataModule, args)


def _complain(error: Any) -> int:
    print(f"prime-lightning: {error}\n({TRACEBACK}=1 shows where it comes from.)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
