"""Whole runs on a device that holds less than a batch give what smaller batches give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scarce import holding
from tiny_models import tiny_tokens

from trim_export import forward
from trim_export.artifact import Artifact
from trim_export.forward import Compute
from trim_export.models import load_model
from trim_export.progress import silently
from trim_export.prune import prune
from trim_export.recipe import Recipe
from trim_export.structured.flap import fluctuations

CPU = Compute(torch.device("cpu"), autocast=False)
LENGTH = 12
TOKENS = tiny_tokens(7, LENGTH)
AGAIN = "cpu is out of memory: trying again with 3 windows at a time"


def stored(artifact: Artifact) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in artifact.path.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("llama", Recipe(0.6, context_length=0)),
        ("opt", Recipe(0.6, targets="own", update="refit", rows="trim", context_length=0)),
        ("gemma3", Recipe(0.6, update="none", context_length=0)),
    ],
    ids=["residual", "own", "no update"],
)
def test_a_pruned_model_has_the_bits_of_smaller_batches(
    kind: str, recipe: Recipe, tiny: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    dense = load_model(str(tiny(kind)))
    with holding(dense.model, 3 * LENGTH):
        found = prune(dense, recipe, TOKENS, tmp_path / "found", CPU)
    assert AGAIN in caplog.text
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", 3 * LENGTH)
    caplog.clear()
    expected = prune(load_model(str(tiny(kind))), recipe, TOKENS, tmp_path / "expected", CPU)
    assert caplog.text == ""
    assert stored(found) == stored(expected)


def test_fluctuations_are_those_of_smaller_batches(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dense = load_model(str(tiny("llama")))
    with holding(dense.model, 3 * LENGTH):
        found = fluctuations(dense, TOKENS, CPU, silently)
    assert AGAIN in caplog.text
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", 3 * LENGTH)
    expected = fluctuations(dense, TOKENS, CPU, silently)
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert torch.equal(one.mean, expected[name].mean)
        assert torch.equal(one.variance, expected[name].variance)
