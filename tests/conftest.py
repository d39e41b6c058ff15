"""Fixtures of all tests: no network, no caches outside of pytest's folder, and one tiny model as a folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported

import datasets
import pytest
import tiny
import torch
from transformers import Qwen2ForCausalLM

from prime_lightning.arithmetic import write_model
from prime_lightning.engines.hf import HFEngine

datasets.disable_progress_bars()
torch.set_num_threads(1)  # matrices this small gain nothing from more


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The arithmetic model, freshly initialised."""
    return str(write_model(tmp_path_factory.mktemp("model"), hidden_size=32))


@pytest.fixture(scope="session")
def sharp_folder(tmp_path_factory):
    """The same with large weights: its next-token distributions depend strongly on the context."""
    folder = write_model(tmp_path_factory.mktemp("sharp"), hidden_size=32)
    model = Qwen2ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def engine(sharp_folder):
    """A started engine; tests leave its weights as they are."""
    engine = HFEngine(batch_size=64, device="cpu")
    engine.start(sharp_folder)
    return engine


@pytest.fixture(scope="session")
def warm_model(tmp_path_factory):
    """A model that answers some of the two-step chains, for runs that need rewards of both kinds."""
    return tiny.warm(tmp_path_factory.mktemp("warm"))
