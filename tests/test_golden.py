"""Five iterations against the numbers that were kept; see golden/make_run.py."""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "golden"))

import make_run


def test_five_iterations_give_the_kept_numbers():
    expected, got = json.loads(make_run.FILE.read_text()), make_run.run()
    assert len(got) == len(expected) == 5
    for i, (now, kept) in enumerate(zip(got, expected, strict=True)):
        assert now.keys() == kept.keys()
        for name, value in kept.items():
            same = math.isclose(now[name], value, rel_tol=1e-3, abs_tol=1e-5)
            assert same or math.isnan(value), f"iteration {i}, {name}: {now[name]}, kept was {value}"
