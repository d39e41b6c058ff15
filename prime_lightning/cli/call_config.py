"""What a Python call says, as layers of YAML: options by their last name, rows and a reward function as files.

The first rank writes; other ranks wait for its files.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dill
import lightning.pytorch as pl
import torch
import yaml

from prime_lightning.evaluation.resources import resource
from prime_lightning.models.pretrained import load_tokenizer
from prime_lightning.prompts.dataset import CODE_USER, MATHS_USER, DatasetPrompts
from prime_lightning.prompts.rows import load_rows
from prime_lightning.rollout.files import replace_rows, replace_text
from prime_lightning.sampling.datamodule import RolloutDataModule
from prime_lightning.training.module import PrimeModule
from prime_lightning.training.run_metadata import import_path

Reward = Callable[[str, str, Mapping[str, Any]], float]
"""`(prompt, completion, row) -> score` from 0 to 1."""
GROUPS: dict[str, Callable[..., None]] = {
    "trainer": pl.Trainer.__init__,
    "model": PrimeModule.__init__,
    "data": RolloutDataModule.__init__,
    "dataset": DatasetPrompts.__init__,
}
OF_HUB: dict[str, Any] = {"split": "train", "name": None, "revision": None}
"""What says which part of a hub data set is meant, as `DatasetPrompts` takes it."""
TESTS = {"tests", "test", "test_list", "test_cases", "unit_tests", "input_output"}
"""Columns by which a data set is one of programs."""
ADAPTER = '''"""The reward that was given to `prime_lightning.train`."""

from pathlib import Path

import dill

given = dill.loads(Path(__file__).with_suffix(".pkl").read_bytes())


def reward(prompt, completion):
    """What verifiers call."""
    return given(prompt.text, completion, dict(prompt.row))
'''
PATIENCE = 600.0  # seconds that other ranks wait for the files of the first one


def call_layer(
    out: Path, model: str, dataset: Any, reward: Reward | str | None, prm: str | None, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The layer that says what the call says; rows and the reward are written into the run's folder.

    Raises:
        ValueError: if an option is unknown, a value cannot stand in YAML, or there are no rows.
    """
    path, columns = _rows(out, dataset, overrides)
    kind = _kind(out, reward) if reward is not None else "code" if columns & TESTS else "math"
    asked: dict[str, Any] = {"trainer": {"default_root_dir": str(out)}, "model": {"policy": model}}
    if prm != "same":
        asked["model"] |= {"prm": prm, "reference": prm}
    rows: dict[str, Any] = {"path": path, "kind": kind}
    asked["data"] = {"train": {"class_path": import_path(DatasetPrompts), "init_args": rows}}
    rows["template"] = _template(model, kind, {*columns, *overrides.get("columns", ())})
    for name, value in overrides.items():
        name = "seed_everything" if name == "seed" else name
        group = _group(name)
        place = rows if group == "dataset" else asked.setdefault(group, {}) if group else asked
        said, before = plain(value), place.get(name)
        place[name] = {**before, **said} if isinstance(before, dict) and isinstance(said, dict) else said
    return asked


def _template(model: str, kind: str, columns: set[str]) -> dict[str, Any] | None:
    """The prompt: that of PRIME's authors for maths and code, else the problem alone; None leaves messages as they are.

    A tokenizer without a chat template gets it as it is.
    """
    if "problem" not in columns and kind in ("math", "code"):
        return None
    user = {"math": MATHS_USER, "code": CODE_USER}.get(kind, "{problem}" if "problem" in columns else "{prompt}")
    return {"user": user, "chat": load_tokenizer(model).chat_template is not None}


def _group(name: str) -> str:
    """Where an option stands; empty for one of no group.

    Raises:
        ValueError: if it is in none.
    """
    if name in ("seed_everything", "alarms"):
        return ""
    found = [group for group, makes in GROUPS.items() if name in inspect.signature(makes).parameters]
    if not found or name in ("policy", "train", "path", "kind"):
        raise ValueError(
            f"Expected options of `prime-lightning fit` by their last name, got {name!r}, which is none of the "
            f"trainer, the module, the data module or the data set. `prime-lightning fit --help` lists them; "
            "`config={...}` takes any."
        )
    return found[0]


def plain(value: Any) -> Any:
    """A value as YAML has it; functions and classes by import path.

    Raises:
        ValueError: if it cannot stand there.

    Example:
        >>> plain({"k": (1, Path("a"))}), plain(call_layer)
        ({'k': [1, 'a']}, 'prime_lightning.cli.call_config.call_layer')
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if (inspect.isfunction(value) or inspect.isclass(value)) and "<" not in import_path(value):
        return import_path(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        "Expected what YAML can hold (numbers, text, lists, mappings, functions and classes that can be imported), "
        f"got a {type(value).__name__}. Say it as {{'class_path': ..., 'init_args': {{...}}}}."
    )


def _rows(out: Path, dataset: Any, overrides: Mapping[str, Any]) -> tuple[str | list[str], set[str]]:
    """The data set's path, and its columns; rows are written into the run's folder."""
    if isinstance(dataset, (str, Path)):
        of_hub = {name: overrides.get(name, usual) for name, usual in OF_HUB.items()}
        return str(dataset), set(load_rows(str(dataset), **of_hub).column_names)
    path = out / "dataset.jsonl"
    columns = write_rows(path, dataset)
    if not columns:
        raise ValueError("Expected rows to train on, got none.")
    return str(path), columns


def take_back(out: Path) -> None:
    """Leave a folder as it was found, empty, if nothing but a call's own files is in it."""
    own = re.compile(r"call\.yaml|config\d+\.yaml|dataset\.jsonl|reward_\w+\.(py|pkl)")
    there = list(out.iterdir()) if out.is_dir() else []
    if all(path.is_file() and own.fullmatch(path.name) for path in there):
        for path in there:
            path.unlink()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Write JSON lines; returns the columns. What JSON cannot hold, such as a date, becomes text.

    Raises:
        ValueError: if a row is no mapping.
    """
    columns: set[str] = set()

    def checked() -> Iterator[Mapping[str, Any]]:
        for row in rows:
            if not isinstance(row, Mapping):
                raise ValueError(f"Expected rows that are mappings of columns to values, got a {type(row).__name__}.")
            columns.update(row)
            yield row

    replace_rows(path, checked(), default=str)
    return columns


def _kind(out: Path, reward: Reward | str) -> str:
    """The verifier that calls the reward: itself by name, or a module in the run's folder that has it by value."""
    if isinstance(reward, str):
        return reward
    name = f"reward_{out.name}".replace("-", "_").replace(".", "_")
    (out / f"{name}.pkl").write_bytes(dill.dumps(reward, recurse=True))
    (out / f"{name}.py").write_text(ADAPTER, encoding="utf-8")
    return f"{name}.reward"


def lower_layers(config: Any, out: Path) -> list[str]:
    """The files of all layers below the call's own; mappings are written into the run's folder."""
    cuda = torch.cuda.is_available()
    layers = [resource("conf", "train.yaml"), resource("conf", "strategy", "one_gpu.yaml" if cuda else "cpu.yaml")]
    layers += [resource("conf", "engine", "vllm.yaml" if cuda and find_spec("vllm") else "hf.yaml")]
    for i, given in enumerate([config] if isinstance(config, (str, Path, Mapping)) else config):
        path = Path(str(given)) if not isinstance(given, Mapping) else out / f"config{i}.yaml"
        if isinstance(given, Mapping) and first_rank():
            write(path, plain(given))
        wait_for(path)
        layers.append(path)
    return [str(path) for path in layers]


def write(path: Path, layer: Mapping[str, Any]) -> None:
    """Write a layer; it appears whole."""
    replace_text(path, yaml.safe_dump(dict(layer), sort_keys=False, allow_unicode=True))


def first_rank() -> bool:
    """Whether this process is to write what all of a run read."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def wait_for(path: Path) -> None:
    """Until the first rank has written a file.

    Raises:
        FileNotFoundError: if it does not come.
    """
    until = time.monotonic() + PATIENCE * (not first_rank())
    while not path.exists():
        if time.monotonic() > until:
            raise FileNotFoundError(f"Expected the file {str(path)!r}, got none.")
        time.sleep(0.1)
