"""The commands, and what runs them; those that are not of LightningCLI stand here, one a file."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

LIGHTNING = {
    "fit": "train by PRIME",
    "sft": "supervised warm start",
    "prm": "train an implicit PRM on labelled responses",
    "validate": "pass@1 on validation prompts",
    "test": "the same as validate",
    "predict": "rollouts with their process rewards",
}
"""Commands of LightningCLI, and what they do."""
COMMANDS = {
    "doctor": ("prime_lightning.cli.commands.doctor", "what this machine has for a run, and what to do about the rest"),
    "plan": ("prime_lightning.cli.commands.plan", "memory, time and cost of a run before renting GPUs"),
    "quickstart": ("prime_lightning.cli.commands.quickstart", "a tiny model learns arithmetic, on a CPU, in minutes"),
    "evaluate": ("prime_lightning.cli.commands.evaluate", "benchmarks of a model, or of given completions"),
    "data": ("prime_lightning.cli.commands.contamination", "`check`: training prompts that stand in a benchmark"),
    "export": ("prime_lightning.cli.commands.export", "a model of a checkpoint as a Hugging Face folder"),
    "score": ("prime_lightning.cli.commands.score", "rewards of tokens, steps and responses by a PRM"),
    "rerank": ("prime_lightning.cli.commands.rerank", "best of n by a PRM, against majority and pass@n"),
    "processbench": ("prime_lightning.cli.commands.processbench", "how well a PRM finds the first wrong step"),
    "report": ("prime_lightning.cli.commands.report", "runs as one HTML file: curves, health, credit token by token"),
    "verify": ("prime_lightning.cli.commands.verify", "grade a file of completions"),
    "completion": ("prime_lightning.cli.commands.completion", "what bash or zsh completes commands and options by"),
}
"""Commands that are no LightningCLI: the module whose `main(arguments) -> exit status` runs them, and what they do."""


def runner(command: str) -> Callable[[list[str]], int]:
    """What runs a command and returns the exit status, with all that it needs imported."""
    if command != "doctor":  # which shows no bars, and is quick
        from prime_lightning.models.third_party_bars import quiet_libraries

        quiet_libraries()
    if command in COMMANDS:
        main_of: Callable[[list[str]], int] = import_module(COMMANDS[command][0]).main
        return main_of
    from prime_lightning.cli.lightning_cli import lightning

    def run(rest: list[str]) -> int:
        lightning([command, *rest])
        return 0

    return run
