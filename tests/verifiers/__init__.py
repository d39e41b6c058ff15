"""Tests of the verifiers. Wall-clock speed is never asserted here: `benchmarks/verifiers.py` measures."""
