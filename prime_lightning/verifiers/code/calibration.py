"""How each task is run, found out with its reference and kept on disk: mode, in-place changes, asserts, CPU limit.

Leaves out: tasks without a reference; their plan comes from the form of their tests, and every test must execute an
assert.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import threading
from collections import OrderedDict
from pathlib import Path

from prime_lightning.rollout.files import replace_text
from prime_lightning.verifiers.code.run import Outcome, Plan, Runner
from prime_lightning.verifiers.code.tests import Task
from prime_lightning.verifiers.options import CodeOptions

_VERSION = 2  # raise it when what a plan means changes
_REFERENCE_SECONDS = 40  # CPU time that a reference may take
_SLACK = 4  # a program may take so many times the reference's CPU time
_REMEMBERED = 100_000


class UnusableTask(Exception):  # noqa: N818  (not an error of ours, but of the data)
    """The reference does not pass its own tests."""


class Calibrations:
    """Plans of tasks. Thread-safe; a task is calibrated by whoever needs it first.

    Args:
        options: Limits; they and the Python version are part of a plan's name on disk.
    """

    def __init__(self, options: CodeOptions) -> None:
        self._options = options
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self._folder = Path(options.cache_folder or f"{cache}/prime_lightning/verifiers").expanduser()
        self._plans: OrderedDict[str, Plan | str] = OrderedDict()
        self._under_way: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def plan(self, task: Task, runner: Runner) -> Plan:
        """The plan of a task, from memory, from disk or by running its reference.

        Raises:
            UnusableTask: The reference fails; the message says how.
            WorkerDied: The jail failed.
        """
        if not task.reference:
            return _guess(task)
        key = self._key(task)
        with self._lock:
            found = self._plans.get(key)
            mine = self._under_way.setdefault(key, threading.Lock()) if found is None else None
        if mine is not None:
            with mine:
                found = self._plans.get(key) or self._load(key)
                if found is None:
                    found = calibrate(task, runner, self._options)
                    self._save(key, found)
                with self._lock:
                    self._plans[key] = found
                    self._under_way.pop(key, None)
                    while len(self._plans) > _REMEMBERED:
                        self._plans.popitem(last=False)
        if isinstance(found, Plan):
            return found
        raise UnusableTask(found)

    def _key(self, task: Task) -> str:
        options = self._options
        about = (
            _VERSION,
            sys.version_info[:2],
            options.memory_megabytes,
            options.modules,
            options.tolerance,
            options.cpu_seconds,
        )
        return hashlib.sha256(f"{task.key()} {about}".encode()).hexdigest()[:32]

    def _load(self, key: str) -> Plan | str | None:
        try:
            stored = json.loads((self._folder / key[:2] / f"{key}.json").read_text())
            if "unusable" in stored:
                return str(stored["unusable"])
            return Plan(**{**stored, "asserts": tuple(stored["asserts"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None  # absent, or written by another version: calibrate again

    def _save(self, key: str, plan: Plan | str) -> None:
        stored = dataclasses.asdict(plan) if isinstance(plan, Plan) else {"unusable": plan}
        with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
            replace_text(self._folder / key[:2] / f"{key}.json", json.dumps(stored))


def _guess(task: Task) -> Plan:
    """By the form of the tests alone."""
    if task.stdio:
        return Plan(mode="stdio")
    if task.functions or (task.calls is not None and not task.in_place):
        return Plan(mode="calls")
    return Plan(mode="script", in_place=task.in_place)


def _candidates(task: Task) -> list[Plan]:
    first = dataclasses.replace(_guess(task), cpu_seconds=_REFERENCE_SECONDS)
    if not task.tests:
        return [first]
    scripts = [
        Plan(mode="script", in_place=in_place, asserts=(-1,) * len(task.tests), cpu_seconds=_REFERENCE_SECONDS)
        for in_place in (task.in_place, not task.in_place)
    ]
    return [first, *scripts] if first.mode == "calls" else scripts


def calibrate(task: Task, runner: Runner, options: CodeOptions) -> Plan | str:
    """The first plan by which the reference passes, with its counts and limit; or why there is none.

    Raises:
        WorkerDied: The jail failed.
    """
    outcome = Outcome()
    for plan in _candidates(task):
        outcome = runner.run(task, plan, task.reference)
        if outcome.share == 1.0:
            seconds = max(options.cpu_seconds, math.ceil(_SLACK * outcome.cpu_seconds))
            return dataclasses.replace(plan, asserts=outcome.asserts, cpu_seconds=seconds)
    return f"the reference fails its tests: {outcome.fault or outcome.reason}"
