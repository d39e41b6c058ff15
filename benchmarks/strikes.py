"""What happens to the run of `drill.py`: signals, a full disk, gradients that are NaN, and how it is started again."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime_lightning.cli.commands.quickstart import config

KINDS = ("rank", "launcher", "engine", "verifier", "disk", "nan")
BOUND = 120.0  # seconds until all processes must have ended
DISK = 8 * 2**20  # of the small one; a checkpoint takes a third of it
LAYER = """
trainer:
  default_root_dir: {folder}
  devices: 2
  strategy: {{class_path: prime_lightning.training.strategies.PrimeDDPStrategy}}
  max_steps: {iterations}
  logger: false
  callbacks:
    - class_path: drill.Struck
      init_args: {{folder: {folder}}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {folder}/checkpoints, every_n_train_steps: 1, save_last: true, save_top_k: 0}}
model: {{policy: {model}, policy_update: {{minibatches: 5}}, prm_update: {{minibatches: 2}}}}
data:
  train: {{class_path: drill.Graded, init_args: {{seed: 1, operations: 2}}}}
  engine: {{class_path: drill.ChildEngine, init_args: {{folder: {folder}}}}}
  sampling: {{samples: 4, max_tokens: 8}}
  prompts_per_batch: 8
  accuracy_filter: {{low: {low}, high: {high}}}
  check_answers: false
  verifiers: {{class_path: prime_lightning.verifiers.Verifiers, init_args: {{workers: 1}}}}
"""


@dataclass
class Event:
    kind: str
    iteration: int
    seconds: float | None = None
    """Until all processes were gone; None where the run went on."""
    said: str = ""


class Drill:
    """The run that is struck."""

    def __init__(self, folder: Path, model: Path, iterations: int, seed: int, accuracies: Sequence[float]) -> None:
        self.folder, self.iterations, self.random = folder, iterations, random.Random(seed)
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.layer = folder / "layer.yaml"
        self.layer.write_text(
            LAYER.format(folder=folder, model=model, iterations=iterations, low=accuracies[0], high=accuracies[1])
        )
        self.starts = 0

    def start(self) -> subprocess.Popen[str]:
        """Both ranks under torchrun, from `last` if there is one."""
        (self.folder / "progress").unlink(missing_ok=True)
        last = self.folder / "checkpoints" / "last.ckpt"
        resume = ["--ckpt_path", str(last)] if last.exists() else []
        fit = ["fit", "--config", str(config("quickstart.yaml")), "--config", str(self.layer), *resume]
        words = ["--standalone", "--nproc-per-node=2", "-m", "prime_lightning", *fit]
        self.starts += 1
        here = Path(__file__).resolve().parent
        path = f"{here}:{here.parent}"
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def log(self) -> Path:
        return self.folder / f"log{self.starts}.txt"

    def progress(self) -> int:
        path = self.folder / "progress"
        return int(path.read_text()) if path.exists() else -1

    def strike(self, kind: str, run: subprocess.Popen[str], last: int) -> Event:
        """Do it at a random moment, zero to two iterations from here; then see to it that everything ends."""
        soon = min(max(self._begun(run), last) + self.random.randint(0, 2), self.iterations - 3)
        self._until(lambda: self.progress() >= soon, run)
        time.sleep(0.3 * self.random.random())
        event = Event(kind, self.progress())
        began = time.monotonic()
        getattr(self, kind)(run)
        if kind == "verifier":
            return event
        code = run.wait(BOUND)
        self._until(lambda: not any(alive(pid) for pid in self.pids()), None)
        event.seconds = time.monotonic() - began
        assert code != 0, f"the run ended well after {kind}"
        event.said = self._said()
        self._mend()
        return event

    def _begun(self, run: subprocess.Popen[str]) -> int:
        self._until(lambda: self.progress() >= 0, run)
        return self.progress()

    def _until(self, there: Any, run: subprocess.Popen[str] | None) -> None:
        end = time.monotonic() + BOUND
        while not there():
            if time.monotonic() > end or (run is not None and run.poll() is not None):
                raise SystemExit(f"The run stands or ended by itself:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("*.pid")]

    def _pid(self, name: str) -> int:
        return int((self.folder / f"{name}{self.random.randint(0, 1)}.pid").read_text())

    def rank(self, run: subprocess.Popen[str]) -> None:
        os.kill(self._pid("rank"), signal.SIGKILL)

    def launcher(self, run: subprocess.Popen[str]) -> None:
        run.kill()

    def engine(self, run: subprocess.Popen[str]) -> None:
        os.kill(self._pid("engine"), signal.SIGKILL)

    def verifier(self, run: subprocess.Popen[str]) -> None:
        others = set(self.pids())
        workers = [pid for pid in children(self._pid("rank")) if pid not in others]
        os.kill(self.random.choice(workers), signal.SIGKILL)

    def disk(self, run: subprocess.Popen[str]) -> None:
        """No more room: the small disk fills up, or, where there is none, rank 0 may write no large files."""
        if not self.checkpoints.is_mount():
            pid = int((self.folder / "rank0.pid").read_text())
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096))
            return
        with contextlib.suppress(OSError), (self.checkpoints / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))

    def nan(self, run: subprocess.Popen[str]) -> None:
        (self.folder / "nan").touch()

    def _mend(self) -> None:
        for path in (self.folder / "nan", self.checkpoints / "ballast"):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def small_disk(self) -> Iterator[None]:
        """A disk of little room under the checkpoints, for those who may mount one."""
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.checkpoints)]
        mounted = bool(shutil.which("mount")) and not subprocess.run(mount, capture_output=True).returncode
        try:
            yield
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(self.checkpoints)])

    def _said(self) -> str:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("prime-lightning: ")]
        return " / ".join(dict.fromkeys(line.removeprefix("prime-lightning: ")[:160] for line in lines))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
