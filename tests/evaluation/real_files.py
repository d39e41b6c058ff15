"""Published benchmark files, where copies are at hand: `PRIME_TEST_DATA` names their folder."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("PRIME_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


def script():
    """`benchmarks/references.py`, which knows the names of the files."""
    spec = importlib.util.spec_from_file_location("references", REPOSITORY / "benchmarks" / "references.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = script().FILES


def real(name):
    """The file of a benchmark; skips where there is none."""
    path = DATA / FILES.get(name, name)
    if not path.is_file():
        pytest.skip("no data folder: set PRIME_TEST_DATA")
    return str(path)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
