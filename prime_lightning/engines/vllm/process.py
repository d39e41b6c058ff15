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
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Protocol

import prime_lightning
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


class EngineDiedError(ChildProcessError):
    """The engine's process is gone or hangs; what it was sampling is lost."""


class Channel(Protocol):
    """What draws samples, as `EngineProcess` does."""

    info: dict[str, Any]
    """`max_model_len` and more."""

    def open(self, name: str) -> None:
        """Make room for the news of samples whose id begins with this name and a dot."""
        ...

    def close_stream(self, name: str) -> None:
        """Forget such samples."""
        ...

    def next(self, name: str, stall: float) -> tuple[Any, ...]:
        """The next news of a stream."""
        ...

    def send(self, *message: Any) -> None:
        """Send a message."""
        ...


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
    """One process with one vLLM engine.

    Args:
        arguments: vLLM's engine arguments.
        environment: Of the process, besides what `clean_environment` gives.
    """

    def __init__(self, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> None:
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
        self._mail: dict[str, queue.SimpleQueue[tuple[Any, ...] | None]] = {}
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

    def open(self, name: str) -> None:
        """Make room for the news of samples whose id begins with this name and a dot."""
        self._mail[name] = queue.SimpleQueue()
        if self._dead.is_set():
            self._mail[name].put(None)

    def close_stream(self, name: str) -> None:
        """Forget such samples."""
        self._mail.pop(name, None)

    def next(self, name: str, stall: float) -> tuple[Any, ...]:
        """The next news of a stream.

        Raises:
            EngineDiedError: if the process is gone, or gave no sign of life for `stall` seconds.
        """
        while True:
            with contextlib.suppress(queue.Empty):
                news = self._mail[name].get(timeout=min(1.0, stall))
                if news is None:
                    raise self._death("died")
                return news
            if time.monotonic() - self._heard > stall:
                raise self._death(f"gave no sign of life for {stall:g} s (`stall_timeout`)")

    def send(self, *message: Any) -> None:
        """Send a message.

        Raises:
            EngineDiedError: if nobody can get it.
        """
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            raise self._death("died") from None
        self._heard = max(self._heard, time.monotonic())

    def call(self, method: str, timeout: float, **arguments: Any) -> Any:
        """Run a method of `vllm_child.Server` and wait for its answer.

        Raises:
            EngineDiedError: if the process dies, or does not answer in `timeout` seconds.
            RuntimeError: with its traceback, if the method fails.
        """
        number = next(self._numbers)
        answers = self._answers[number] = queue.SimpleQueue()
        try:
            if self._dead.is_set():
                raise self._death("died")
            self.send("call", number, method, arguments)
            answer = answers.get(timeout=timeout)
        except queue.Empty:
            raise self._death(f"did not answer `{method}` in {timeout:g} s (`stall_timeout`)") from None
        finally:
            del self._answers[number]
        if answer is None:
            raise self._death("died")
        ok, value = answer
        if not ok:
            raise RuntimeError(f"The vLLM engine failed at `{method}`:\n{value}")
        return value

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
            for sample in rest[0]:
                self._deliver("done", sample)
        elif kind == "rejected":
            self._deliver("rejected", rest)

    def _deliver(self, kind: str, sample: Any) -> None:
        box = self._mail.get(sample[0].split(".")[0])
        if box is not None:  # else its stream was closed
            box.put((kind, *sample))

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


class ProcessClient:
    """The control calls of a weight transfer, over the process's socket.

    Args:
        process: Where they go.
        timeout: Seconds for each.
    """

    def __init__(self, process: EngineProcess, timeout: float) -> None:
        self.process, self.timeout = process, timeout

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Shake hands."""
        self.process.call("init_weight_transfer_engine", self.timeout, init_info=init_info)

    def start_weight_update(self) -> None:
        """Make the model ready to take weights."""
        self.process.call("start_weight_update", self.timeout)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one piece."""
        self.process.call("update_weights", self.timeout, update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Take the weights into use."""
        self.process.call("finish_weight_update", self.timeout, weight_version=weight_version)

    def read_back(self, columns: dict[str, int]) -> dict[str, list[float]]:
        """Values of the engine's own weights."""
        return self.process.call("read_back", self.timeout, columns=columns)  # type: ignore[no-any-return]
