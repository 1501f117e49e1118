"""Predictions: sizes are exact, and every choice costs what it is known to need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

import trim_export.plan
from trim_export.artifact import Artifact
from trim_export.forward import Compute
from trim_export.layer_budgets import Auto, Owl, Uniform
from trim_export.models import load_model
from trim_export.plan import Plan, predict
from trim_export.prune import prune
from trim_export.recipe import Recipe

CPU = Compute(torch.device("cpu"), autocast=False)
BASE = Recipe(0.5, layers=Uniform(), rows="uniform", update="none", context_length=0)


@pytest.fixture(autouse=True)
def _same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trim_export.plan, "_multiplication_rate", lambda *_: 1e9)


def plan(recipe: Recipe = BASE, dtype: torch.dtype = torch.float32) -> Plan:
    return predict(tiny_model("llama"), dtype, recipe, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_the_tensors_of_the_artifact_take_what_was_predicted(
    sparsity: float, dtype: torch.dtype, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    dense = load_model(str(tiny("llama", dtype)))
    recipe = replace(BASE, sparsity=sparsity)
    artifact = prune(dense, recipe, tiny_tokens(), tmp_path / "out", CPU)
    predicted = plan(recipe, dtype)
    assert predicted.dense_bytes == artifact.manifest["bytes"]["dense"]
    stored = sum(payload(artifact, shard) for shard in artifact.shards)
    # Counts of each matrix are whole numbers.
    assert abs(predicted.artifact_bytes - stored) <= len(artifact.modules) * dtype.itemsize


def payload(artifact: Artifact, shard: str) -> int:
    data = (artifact.path / shard).read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_work_of_a_mask_is_two_passes_over_the_text() -> None:
    model = tiny_model("llama")
    products = 2 * sum(p.numel() for name, p in model.named_parameters() if "proj" in name) * 128 * 128
    assert plan().seconds == pytest.approx(2 * trim_export.plan.FORWARD * products / 1e9)


@pytest.mark.parametrize(
    "more",
    [
        {"layers": Owl()},
        {"layers": Auto()},
        {"score": "gblm"},
        {"rows": "trim"},
        {"update": "refit"},
        {"update": "admm"},
        {"samples": 256},
        {"sequence_length": 256},
    ],
    ids=str,
)
def test_whatever_does_more_takes_longer_and_no_less_memory(more: dict[str, object]) -> None:
    before, after = plan(), plan(replace(BASE, **more))
    assert after.seconds > before.seconds
    assert after.peak_memory_bytes >= before.peak_memory_bytes
    assert after.artifact_bytes == before.artifact_bytes


def test_trials_cost_an_update_for_each_candidate_however_short_their_text() -> None:
    recipe = replace(BASE, update="admm")
    once, tried = plan(recipe), plan(replace(recipe, layers=Auto()))
    assert tried.seconds > 2 * once.seconds
    assert tried.peak_memory_bytes > once.peak_memory_bytes


def test_gradients_of_every_prunable_weight_are_held() -> None:
    added = plan(replace(BASE, score="gblm")).peak_memory_bytes - plan().peak_memory_bytes
    assert added == 4 * plan().prunable


def test_the_probe_leaves_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    threads = torch.get_num_threads()
    assert trim_export.plan._multiplication_rate(CPU, torch.float32) > 0
    assert torch.get_num_threads() == threads
