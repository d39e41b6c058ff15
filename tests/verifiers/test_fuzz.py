"""Runs the fuzzer for a moment, where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_a_short_fuzz_finds_nothing(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    seeds = [
        rb'0["d",["a",["l",1,["f","0x1p3"]]]]',
        rb"1so \boxed{\frac{1}{2}\text{ cm}}, \boxed{(1,2)}",
        b"2```python\ndef f(): pass\n```",
    ]
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    script = Path(__file__).parent / "fuzz_texts.py"
    command = [
        sys.executable,
        str(script),
        "-runs=20000",
        "-max_total_time=10",
        "-timeout=10",
        "-max_len=2000",
        "-malloc_limit_mb=1024",
        "-rss_limit_mb=0",  # a process begins with the peak of the one that started it
        str(corpus),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
