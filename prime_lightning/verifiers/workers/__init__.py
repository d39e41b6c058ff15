"""Processes that grade: pools, persistent ones, sandboxes."""
