"""The settings of the verifiers, as plain data that YAML and the command line can fill in.

Without slots: jsonargparse reads the default of a dataclass argument by `vars`.
"""

from __future__ import annotations

from dataclasses import dataclass

PLACES = ("boxed", "final", "anywhere")
"""Values of `MathOptions.answer`."""
REASONING = (
    "<think> </think>",
    "<thinking> </thinking>",
    "<thought> </thought>",
    "<reasoning> </reasoning>",
    "<|begin_of_thought|> <|end_of_thought|>",
    "[THINK] [/THINK]",
    "◁think▷ ◁/think▷",
)
_TIERS = ("auto", "bubblewrap", "landlock", "no-open")


@dataclass(frozen=True, kw_only=True)
class MathOptions:
    """What counts as the same answer, and how long it may take to find out; docs/verifiers.md has the table.

    Example:
        >>> MathOptions(ordered_lists=True).percent
        'lenient'
    """

    answer: str = "boxed"
    """Where the answer stands. `boxed`: in the last box, as PRIME's authors have it. `final`: there, or without any box
    where the completion says so ("the answer is 5", `#### 5`, `A: 5`, `**5**` at the end). `anywhere`: there, or what
    math-verify takes from the last lines."""
    reasoning_tags: tuple[str, ...] = REASONING
    """Opening and closing tag, with a space between, of blocks that are cut off first; an unclosed one is no answer."""
    percent: str = "lenient"
    """`lenient`: 50 and 50% and 0.5 (against a written %) agree. `strict`: 50% is 0.5 and nothing else."""
    units: str = "lenient"
    """`lenient`: a unit may be left out or added, never differ. `strict`: it must be there as in the reference."""
    bases: str = "strict"
    """`strict`: 101_2 needs its base and agrees with 5. `ignore`: the base's subscript is dropped."""
    ordered_lists: bool = False
    """Whether the order of a bare list `1, 2` counts. It always counts in `(1, 2)`, never in `{1, 2}`."""
    tolerance: float = 1e-6
    """Relative error allowed to a decimal that stands for a number without a finite decimal form (1/3, pi); 0 is
    none."""
    seconds: float = 2.0
    """CPU seconds for one comparison; a completion that needs more is wrong."""
    wall_seconds: float = 8.0
    """The same in wall time, for the case that the CPU clock does not advance."""
    memory_megabytes: int = 2048
    """Address space of a worker."""
    cache: int = 65_536
    """Comparisons remembered, over identical pairs of reference and answer."""

    def __post_init__(self) -> None:
        if any(len(pair.split()) != 2 for pair in self.reasoning_tags):
            raise ValueError(
                "Expected math option `reasoning_tags` to hold opening and closing tags with a space between, "
                f"such as '<think> </think>', got {self.reasoning_tags}."
            )
        for name, allowed in (
            ("answer", PLACES),
            ("percent", ("lenient", "strict")),
            ("units", ("lenient", "strict")),
            ("bases", ("strict", "ignore")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Expected math option `{name}` to be one of {allowed}, got {getattr(self, name)!r}.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"Expected math option `tolerance` in [0, 1), got {self.tolerance}.")


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """How programs are run.

    Example:
        >>> CodeOptions(cpu_seconds=2).wall_seconds
        10.0
    """

    cpu_seconds: int = 3
    """CPU time of one run: of all asserts together, or of one stdin/stdout case. More makes the completion wrong."""
    wall_seconds: float = 10.0
    """The same in wall time: a backstop for programs that sleep."""
    memory_megabytes: int = 1024
    """Address space of a program."""
    output_kilobytes: int = 1024
    """Most that a program may write, beyond four times the expected output."""
    partial: bool = True
    """Score the share of tests passed. False: all or nothing."""
    tolerance: float = 0.0
    """Error allowed to floats and to numbers in printed output, relative and absolute; a row's own `tolerance` wins."""
    tier: str = "auto"
    """`auto`, `bubblewrap`, `landlock` or `no-open`: which walls to use."""
    modules: tuple[str, ...] = ()
    """Third-party modules that programs and their tests may import, loaded once per worker (`numpy`)."""
    cache_folder: str = ""
    """Where calibrations are kept; empty is `~/.cache/prime_lightning/verifiers` (or below `XDG_CACHE_HOME`)."""

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("cpu_seconds", self.cpu_seconds >= 1, "at least 1"),
            ("wall_seconds", self.wall_seconds > 0, "positive"),
            ("memory_megabytes", self.memory_megabytes >= 64, "at least 64"),
            ("tolerance", 0 <= self.tolerance < 1, "in [0, 1)"),
            ("tier", self.tier in _TIERS, f"one of {_TIERS}"),
        ):
            if not ok:
                raise ValueError(f"Expected code option `{name}` {expected}, got {getattr(self, name)!r}.")


@dataclass(frozen=True, kw_only=True)
class UserOptions:
    """How a user's own verifier function is run.

    Example:
        >>> UserOptions(sandbox=True).seconds
        10.0
    """

    seconds: float = 10.0
    """CPU seconds for one call; more makes the verdict unknown."""
    wall_seconds: float = 30.0
    """The same in wall time."""
    sandbox: bool = False
    """Run it without network, files and processes, like a model's program. False: with the trainer's environment."""
    memory_megabytes: int = 4096
    """Address space where `sandbox` is on."""
