"""The benchmark of transports runs, on a small scale, with a server of its own that it ends."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (docs/vllm.md)")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_engines_sample_and_take_weights(tmp_path):
    import transports

    out = tmp_path / "found.json"
    transports.main(["--prompts", "2", "--samples", "2", "--max_tokens", "4", "--turns", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert all(found[what][engine] > 0 for what in ("tokens_per_second", "sync_seconds") for engine in ("pipe", "http"))
