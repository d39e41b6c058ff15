"""A user's own verifier, `(prompt, completion) -> float` named by import path, called in a worker that can be killed.

Whatever goes wrong in it (exception, time-out, crash, a score outside [0, 1]) is unknown, not a label.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import sys
import time
from concurrent.futures import Future

from prime_lightning.rollout import Prompt, Verdict
from prime_lightning.verifiers.options import UserOptions
from prime_lightning.verifiers.workers.launch import ZygoteSpec
from prime_lightning.verifiers.workers.persistent import ForkServer, PersistentWorker, TimedOut
from prime_lightning.verifiers.workers.pool import Pool


class UserGrader:
    """Calls one function. Thread-safe; workers start with the first completion.

    Args:
        function: Its import path.
        options: Limits.
        workers: Processes.
        pending: Completions that may wait before `grade` blocks.
    """

    def __init__(self, function: str, options: UserOptions, *, workers: int, pending: int) -> None:
        self._function, self._options = function, options
        folders = dict.fromkeys(os.path.realpath(entry or os.curdir) for entry in sys.path)
        spec = ZygoteSpec(
            module="user",
            path=tuple(folder for folder in folders if os.path.isdir(folder)),
            settings=(("function", function),),
            whole_package=True,
            inherits=not options.sandbox,
        )
        self._fork_server = ForkServer(spec, protected=options.sandbox, memory_bytes=options.memory_megabytes << 20)
        self._pool = Pool(lambda: PersistentWorker(self._fork_server), workers=workers, pending=pending)

    def grade(self, prompt: Prompt, text: str) -> Future[Verdict]:
        """The function's word on a completion. The future fails only with `WorkerDied`."""
        return self._pool.submit(lambda worker: self._verdict(prompt, text, worker))

    def _verdict(self, prompt: Prompt, text: str, worker: PersistentWorker) -> Verdict:
        begun = time.perf_counter()
        try:
            question = pickle.dumps((dataclasses.replace(prompt, row=dict(prompt.row)), text))
            limits = {"cpu_seconds": self._options.seconds, "wall_seconds": self._options.wall_seconds}
            said = worker.ask(question, **limits)
        except TimedOut:
            return Verdict.unknown(f"time-out in {self._function}", seconds=time.perf_counter() - begun)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            return Verdict.unknown(f"a prompt that cannot be sent: {error}", seconds=time.perf_counter() - begun)
        seconds = time.perf_counter() - begun
        if isinstance(said, str) and not said.startswith("!"):
            with contextlib.suppress(ValueError):
                return Verdict.of_score(float.fromhex(said), reason=f"by {self._function}", seconds=seconds)
        return Verdict.unknown(f"{self._function} failed: {str(said)[1:]}", seconds=seconds)

    def close(self) -> None:
        """End all workers. Idempotent."""
        self._fork_server.kill()
        self._pool.close()
        self._fork_server.close()
