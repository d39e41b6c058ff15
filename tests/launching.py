"""Starts a script as two ranks or more, as torchrun does, each printing into a file: a pipe that nobody reads stops."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def start(
    script: str, folder: Path, *arguments: str, world: int = 2, **environment: str
) -> list[subprocess.Popen[bytes]]:
    """The processes of all ranks; a value of the environment may be one for each `{rank}`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}
    shared = os.environ | size | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | {
            name: value.format(rank=rank) for name, value in environment.items()
        }
        with printed(folder, rank).open("w") as log:
            command = [sys.executable, script, *arguments]
            processes.append(subprocess.Popen(command, env=shared | own, stdout=log, stderr=subprocess.STDOUT))
    return processes


def printed(folder: Path, rank: int) -> Path:
    """Where a rank prints."""
    return folder / f"rank{rank}.log"


def ended(folder: Path, processes: list[subprocess.Popen[bytes]], seconds: float) -> tuple[list[int], list[str]]:
    """Wait for all ranks; their exit codes, and what each printed."""
    try:
        codes = [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [printed(folder, rank).read_text() for rank in range(len(processes))]


def finish(folder: Path, processes: list[subprocess.Popen[bytes]], seconds: float = 1000) -> list[str]:
    """What each rank printed; all ranks have to end well."""
    codes, said = ended(folder, processes, seconds)
    assert codes == [0] * len(processes), "\n".join(said)[-8000:]
    return said


def launch(
    script: str, folder: Path, *arguments: str, seconds: float = 1200, world: int = 2
) -> tuple[list[int], list[str]]:
    """Run all of them to their end on a CPU, whatever that is; as of `ended`."""
    built = str(folder / "built{rank}")
    started = start(script, folder, *arguments, world=world, DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=built)
    return ended(folder, started, seconds)
