"""Files that come with the package: configurations and benchmarks, in an installed wheel or beside it in a clone."""

from __future__ import annotations

from pathlib import Path


def resource(*parts: str) -> Path:
    """The path of a shipped file or folder; it need not exist.

    Example:
        >>> resource("evals", "benchmarks").is_dir()
        True
    """
    package = Path(__file__).parent.parent
    inside = package.joinpath(*parts)
    return inside if inside.exists() else package.parent.joinpath(*parts)
