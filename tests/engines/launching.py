"""Starts a script as two ranks or more, as torchrun does."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(
    script: str, folder: Path, *arguments: str, seconds: float = 1200, world: int = 2
) -> tuple[list[int], list[str]]:
    """Run all of them to their end; returns their exit codes and what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    launcher = {**size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(world):
        with (folder / f"log{rank}").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, script, *arguments],
                    env=os.environ
                    | launcher
                    | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
                    | {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / f"built{rank}")},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [rank.wait(seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return codes, [(folder / f"log{rank}").read_text() for rank in range(world)]
