"""Benchmarks: what they are, how they are run and scored, while training runs and by command."""
