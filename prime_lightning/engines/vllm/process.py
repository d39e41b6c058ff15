"""The trainer's end of the process in which vLLM runs: start it, talk to it, notice its death, leave nothing behind.

Linux only. Imports nothing of vLLM; `vllm/child.py` does, in the other process.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import prime_lightning
from prime_lightning.engines.samples import EngineDiedError, Outcome
from prime_lightning.engines.vllm import group as vllm_group

LAUNCHER = (
    *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "PL_GLOBAL_SEED"),
    *(
        "NCCL_ASYNC_ERROR_HANDLING",
        "NCCL_BLOCKING_WAIT",
        "NCCL_COMM_ID",
    ),  # how ranks fail and meet
)
LAUNCHER_PREFIXES = (
    *("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_"),
    *("SLURM_", "PMI_", "PMIX_", "OMPI_", "HYDRA_"),
)
TAIL = 25  # lines of the log in an error


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what a launcher set for the trainer's own group of processes.

    Args:
        extra: Variables for the engine; they win.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER and not name.startswith(LAUNCHER_PREFIXES)
    }
    source = str(Path(prime_lightning.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [kept.get("PYTHONPATH", ""), source]))
    return kept | {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"} | dict(extra)


class EngineProcess:
    """One process with one vLLM engine: a `Channel`, and the control calls of a weight transfer.

    Args:
        arguments: vLLM's engine arguments.
        environment: Of the process, besides what `clean_environment` gives.
        stall: Seconds to wait for the answer to a call, and for a sign of life.
    """

    def __init__(self, arguments: Mapping[str, Any], environment: Mapping[str, str], stall: float = 300.0) -> None:
        self.stall = stall
        self.window = 2 * arguments["max_num_seqs"]  # computed and queued: the engine never waits for the trainer
        self.folder = Path(tempfile.mkdtemp(prefix="prime_lightning_vllm_"))
        self._connection, theirs = Pipe()
        extra = {"TMPDIR": str(self.folder), "PRIME_LIGHTNING_ENGINE_FOLDER": str(self.folder), **environment}
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prime_lightning.engines.vllm.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=clean_environment({"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")} | extra),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # no Ctrl-C from the terminal, and one group with vLLM's own processes
            )
        theirs.close()
        self.info: dict[str, Any] = {}
        self._fatal, self._ended = "", False
        self._ready, self._dead = threading.Event(), threading.Event()
        self._sending, self._numbers = threading.Lock(), itertools.count()
        self._answers: dict[int, queue.SimpleQueue[tuple[bool, Any] | None]] = {}
        self._mail: dict[str, queue.SimpleQueue[Any]] = {}  # of `next`; None: dead
        self._heard = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died at once: the reader says so
            self._connection.send(dict(arguments))
        threading.Thread(target=self._read, daemon=True).start()
        atexit.register(self.close, 1.0)

    def wait_ready(self, timeout: float) -> None:
        """Wait until the model is loaded.

        Raises:
            EngineDiedError: if it could not be; the message ends with vLLM's own.
        """
        if not self._ready.wait(timeout):
            raise self._death(f"was not ready after {timeout:g} s (`start_timeout`)")
        if self._fatal:
            raise self._death(f"could not start:\n{self._fatal}", log=False)
        if not self.info:
            raise self._death("ended while it started")

    # ---- the channel

    @property
    def context(self) -> int:
        """Longest prompt and completion in tokens."""
        return int(self.info["max_model_len"])

    def open(self, stream: str) -> None:
        """Make room for the outcomes of a stream."""
        self._mail[stream] = queue.SimpleQueue()
        if self._dead.is_set():
            self._mail[stream].put(None)

    def add(self, samples: Sequence[tuple[str, list[int], int | None]], arguments: Mapping[str, Any]) -> None:
        """Begin with samples.

        Raises:
            EngineDiedError: if nobody can take them.
        """
        self._send("add", samples, arguments)

    def next(self, stream: str) -> tuple[str, Outcome]:
        """Wait for a sample to end.

        Raises:
            EngineDiedError: if the process is gone, or gave no sign of life for `stall` seconds.
        """
        while True:
            with contextlib.suppress(queue.Empty):
                news: tuple[str, Outcome] | None = self._mail[stream].get(timeout=min(1.0, self.stall))
                if news is None:
                    raise self._death("died")
                return news
            if time.monotonic() - self._heard > self.stall:
                raise self._death(f"gave no sign of life for {self.stall:g} s (`stall_timeout`)")

    def close_stream(self, stream: str, flying: list[str]) -> None:
        """Forget a stream and abort its samples."""
        self._mail.pop(stream, None)
        if flying:
            with contextlib.suppress(EngineDiedError):  # then nothing flies any more
                self._send("abort", flying)

    # ---- calls

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Shake hands."""
        self.call("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """Make the model ready to take weights."""
        self.call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one piece."""
        self.call("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Take the weights into use."""
        self.call("finish_weight_update", weight_version=weight_version)

    def read_back(self, columns: dict[str, int]) -> dict[str, list[float]]:
        """Values of the engine's own weights."""
        return self.call("read_back", columns=columns)  # type: ignore[no-any-return]

    def call(self, method: str, **arguments: Any) -> Any:
        """Run a method of `child.Server` and wait for its answer.

        Raises:
            EngineDiedError: if the process dies, or does not answer in `stall` seconds.
            RuntimeError: with its traceback, if the method fails.
        """
        number = next(self._numbers)
        answers = self._answers[number] = queue.SimpleQueue()
        try:
            if self._dead.is_set():
                raise self._death("died")
            self._send("call", number, method, arguments)
            answer = answers.get(timeout=self.stall)
        except queue.Empty:
            raise self._death(f"did not answer `{method}` in {self.stall:g} s (`stall_timeout`)") from None
        finally:
            del self._answers[number]
        if answer is None:
            raise self._death("died")
        ok, value = answer
        if not ok:
            raise RuntimeError(f"The vLLM engine failed at `{method}`:\n{value}")
        return value

    # ---- life and death

    def close(self, patience: float = 10.0) -> None:
        """End the process, its children and its files. Calling it twice is fine."""
        if self.process.poll() is None and not self._dead.is_set():
            with contextlib.suppress(OSError), self._sending:
                self._connection.send(("stop",))
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        self._kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.close)

    def log_tail(self) -> str:
        """The end of what the process printed."""
        with contextlib.suppress(OSError):
            return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-TAIL:])
        return ""

    def _send(self, *message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            raise self._death("died") from None
        self._heard = max(self._heard, time.monotonic())

    def _read(self) -> None:
        """Distribute what comes, until the process is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, *rest = self._connection.recv()
                self._heard = time.monotonic()
                self._distribute(kind, rest)
        self._dead.set()
        self._ready.set()
        for box in [*self._mail.values(), *self._answers.values()]:
            box.put(None)
        with self._sending:
            self._connection.close()

    def _distribute(self, kind: str, rest: list[Any]) -> None:
        if kind == "ready":
            self.info = rest[0]
            self._ready.set()
        elif kind == "fatal":
            self._fatal = rest[0]
        elif kind == "ret" and rest[0] in self._answers:
            self._answers[rest[0]].put((rest[1], rest[2]))
        elif kind == "done":
            for name, *sample in rest[0]:
                self._deliver(name, tuple(sample))
        elif kind == "rejected":
            self._deliver(rest[0], ValueError(f"vLLM does not take a prompt: {rest[1]}"))

    def _deliver(self, name: str, outcome: Any) -> None:
        box = self._mail.get(name.split(".")[0])
        if box is not None:  # else its stream was closed
            box.put((name, outcome))

    def _death(self, why: str, log: bool = True) -> EngineDiedError:
        """Make sure that it is dead, and say how it died."""
        if self._dead.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
        status = self.process.poll()
        self._kill()
        how = "it was ended" if status is None else f"exit status {status}"
        if status == -signal.SIGKILL:
            how = "killed from outside; where memory runs out, the kernel does that"
        tail = f" Its last lines:\n{self.log_tail()}" if log else ""
        return EngineDiedError(f"The vLLM process {self.process.pid} {why} ({how}).{tail}")

    def _kill(self) -> None:
        if not self._ended:  # else its number may be another process's by now
            vllm_group.end(self.process.pid, self.info.get("shared_memory", ()))
            self.process.wait()
            self._ended = True
        self._dead.set()
