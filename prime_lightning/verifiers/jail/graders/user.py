"""Grades by a user's own verifier: long-lived workers that call a function `(prompt, completion) -> float`.

Protects: the caller, by being killable. The walls hold only where the user asked for them: else this is an ordinary
process with the trainer's environment. Questions are pickles from the trainer, answers are strings: the score in
hexadecimal, or `!` and what went wrong.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import resource
from collections.abc import Callable
from typing import Any

from prime_lightning.verifiers.jail import wire
from prime_lightning.verifiers.jail.cage import Cage
from prime_lightning.verifiers.jail.zygote import fork

PERSISTENT = True
_found: list[Callable[[Any, str], float]] = []


def prepare(config: dict[str, Any]) -> None:
    """Import the function before the doors close."""
    module, _, name = config["function"].rpartition(".")
    _found.append(getattr(importlib.import_module(module), name))


def start(cage: Cage, job: dict[str, Any], descriptors: list[int]) -> list[int]:
    """One worker, speaking on the descriptor that came."""
    child = fork(lambda: _work(cage, descriptors[0], job["memory_bytes"]))
    os.close(descriptors[0])
    return [child]


def _work(cage: Cage, channel: int, memory_bytes: int) -> None:
    if cage.tier == "limits":
        cage.leave_open({3: channel})
    else:
        cage.enter({3: channel}, cpu_seconds=0, memory_bytes=memory_bytes)
    gc.enable()
    while True:
        prompt, text = pickle.loads(wire.read_frame(3, wire.LIMIT))
        try:
            said = float(_found[0](prompt, text)).hex()
        except Exception as error:
            said = f"!{type(error).__name__}: {error}"[:400]
        wire.write_frame(3, wire.dumps([said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10]))
