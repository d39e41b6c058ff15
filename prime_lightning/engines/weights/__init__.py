"""Weights from a trainer to an engine."""
