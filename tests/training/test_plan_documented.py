"""Every documented command that trains on GPUs fits them, by `prime-lightning plan`."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import models
from test_docs import PAGES, commands
from test_plan import QWEN_7B

from prime_lightning.__main__ import main

REPOSITORY = Path(__file__).parents[2]
HEADERS = [*(REPOSITORY / "conf").rglob("*.yaml"), *(REPOSITORY / "docs" / "cluster").iterdir()]
IN_A_COMMENT = re.compile(r"^#.*?(?:prime-lightning fit|torchrun\.sh|job\.slurm) ((?:.*\\\n#)*.*)$", re.MULTILINE)
QWEN_HALF_B = QWEN_7B | models.QWEN | {"tie_word_embeddings": True}


def documented():
    """The options of each `fit` over the paper's configuration, from pages, and from headers of files."""
    found = [words[1:] for page in PAGES for words in commands(page) if words[0] == "fit"]
    told = [options for file in HEADERS for options in IN_A_COMMENT.findall(file.read_text())]
    found += [tuple(shlex.split(options.replace("\\\n#", " "), comments=True)) for options in told]
    left_out = re.compile(
        r"\.\.\.|--print_config|--ckpt_path|my_\w+\.yaml|strategy/cpu"
    )  # no run on GPUs, or a reader's own
    return sorted({words for words in found if "conf/prime.yaml" in words and not any(map(left_out.search, words))})


def planned(words, config):
    """The exit status of `plan` on cards of 80 GiB, 8 of them where a strategy's layer takes all that there are."""
    taken = any("strategy/" in word and "one_gpu" not in word for word in words)
    gpus = ["--gpus", "8"] if taken else []
    return main(["plan", *words, *gpus, "--gpu-memory", "80", "--model-config", str(config)])


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_a_documented_run_fits(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    shape = QWEN_HALF_B if any("0.5b" in word for word in words) else QWEN_7B
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **shape}))
    assert planned(words, tmp_path / "config.json") == 0, capsys.readouterr().out


def test_seven_billion_under_ddp_does_not_fit(tmp_path, monkeypatch, capsys):
    """So the test above can fail."""
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **QWEN_7B}))
    layers = ["--config", "conf/prime.yaml", "--config", "conf/strategy/ddp.yaml"]
    assert planned(layers, tmp_path / "config.json") == 1
    assert len(documented()) > 10
