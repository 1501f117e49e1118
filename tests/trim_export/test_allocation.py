"""From layer budgets to the sparsity of every matrix, on tiny models against formulas written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from tiny_models import tiny_tokens
from torch import nn

from trim_export.allocation import layer_sparsities
from trim_export.errors import ModelError
from trim_export.forward import Compute, block_calls, embed
from trim_export.layer_budgets import AlphaPruning, Dlp, LayerBudget, Lsa, LsaProjection, Owl, Uniform
from trim_export.models import DenseModel, decoder_blocks, load_model, projections
from trim_export.progress import silently
from trim_export.recipe import Recipe

Tiny = Callable[..., Path]
CPU = Compute(torch.device("cpu"), autocast=False)
TOKENS = tiny_tokens(16, 12)
BUDGETS = [Uniform(), Owl(), AlphaPruning(), Dlp(), Lsa(), LsaProjection()]


def allocate(dense: DenseModel, budget: LayerBudget, sparsity: float, **options: Any) -> list[dict[str, float]]:
    blocks = decoder_blocks(dense.model)
    calls = block_calls(dense.model, list(blocks.values()), TOKENS[:1])
    hidden = embed(dense.model, list(blocks.values()), TOKENS)
    recipe = Recipe(sparsity, layers=budget, rows="uniform", **options, context_length=0)
    return layer_sparsities(budget, recipe, blocks, calls, hidden, CPU, silently)


def matrices(dense: DenseModel) -> list[dict[str, nn.Linear]]:
    return [projections(block) for block in decoder_blocks(dense.model).values()]


def observed(dense: DenseModel) -> list[dict[str, NDArray[np.float64]]]:
    """Inputs ``[tokens, columns]`` of every matrix in one pass of the whole dense model."""
    found: list[dict[str, NDArray[np.float64]]] = [{} for _ in matrices(dense)]
    handles = [
        linear.register_forward_pre_hook(
            lambda module, args, seen=seen, path=path: seen.update(
                {path: args[0].flatten(0, -2).double().numpy().copy()}
            )
        )
        for seen, linears in zip(found, matrices(dense), strict=True)
        for path, linear in linears.items()
    ]
    with torch.no_grad():
        dense.model(TOKENS)
    for handle in handles:
        handle.remove()
    return found


def half_pruned_error(weight: NDArray[np.float64], inputs: NDArray[np.float64]) -> float:
    """Row by row: keep the half that Wanda keeps and solve for it exactly."""
    error = 0.0
    for row in weight:
        kept = np.sort(np.argsort(np.abs(row) * np.linalg.norm(inputs, axis=0))[len(row) // 2 :])
        solution = np.linalg.lstsq(inputs[:, kept], inputs @ row)[0]
        error += float(((inputs[:, kept] @ solution - inputs @ row) ** 2).sum())
    return error


def shifted(sparsities: NDArray[np.float64], sizes: NDArray[np.float64], target: float) -> NDArray[np.float64]:
    """Into [0, 0.95] by the one shift that gives the weighted mean."""

    def moved(shift: float) -> NDArray[np.float64]:
        return np.clip(sparsities + shift, 0, 0.95)

    shift = brentq(lambda shift: np.average(moved(shift), weights=sizes) - target, -10, 10, xtol=1e-13)
    return moved(float(shift))


@pytest.mark.parametrize("by_projection", [False, True])
def test_lsa_on_a_whole_model(by_projection: bool, tiny: Tiny) -> None:
    dense = load_model(str(tiny("llama")))
    units = [
        [
            (half_pruned_error(linear.weight.double().numpy(), inputs[path]), linear.weight.numel())
            for path, linear in linears.items()
        ]
        for linears, inputs in zip(matrices(dense), observed(dense), strict=True)
    ]
    if not by_projection:
        units = [[(sum(error for error, _ in block), sum(size for _, size in block))] for block in units]
    errors, sizes = np.array([unit for block in units for unit in block]).T
    importance = 1 - errors / errors.sum()
    d = (importance - importance.min()) / (importance.max() - importance.min()) * 0.2
    expected = shifted((0.7 * sizes + (d.mean() - d) * sizes.mean()) / sizes, sizes, 0.7)

    allocated = allocate(dense, LsaProjection() if by_projection else Lsa(), 0.7)
    if by_projection:
        given = [block[path] for block, linears in zip(allocated, matrices(dense), strict=True) for path in linears]
    else:
        assert all(len(set(block.values())) == 1 for block in allocated)
        given = [next(iter(block.values())) for block in allocated]
    np.testing.assert_allclose(given, expected, rtol=0, atol=5e-3)
    assert np.ptp(given) > 0.15


def test_dlp_on_a_whole_model(tiny: Tiny) -> None:
    dense = load_model(str(tiny("gemma3")))
    means = np.array(
        [
            np.concatenate(
                [
                    (
                        np.abs(linear.weight.double().numpy()) * np.sqrt((inputs[path] ** 2).sum(axis=0) / len(TOKENS))
                    ).ravel()
                    for path, linear in linears.items()
                ]
            ).mean()
            for linears, inputs in zip(matrices(dense), observed(dense), strict=True)
        ]
    )
    importance = 1 - means / means.sum()
    d = (importance - importance.min()) / (importance.max() - importance.min()) * 0.3
    allocated = allocate(dense, Dlp(0.15), 0.6)
    np.testing.assert_allclose([block["mlp.up_proj"] for block in allocated], 0.6 + d.mean() - d, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.name)
@pytest.mark.parametrize("sparsity", [0.05, 0.6, 0.93])
def test_every_matrix_has_a_sparsity_and_their_mean_is_the_target(
    budget: LayerBudget, sparsity: float, tiny: Tiny
) -> None:
    dense = load_model(str(tiny("opt")))
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    allocated = allocate(dense, budget, sparsity)
    assert [set(block) for block in allocated] == [set(linears) for linears in matrices(dense)]
    given = [
        (block[path], linear.weight.numel())
        for block, linears in zip(allocated, matrices(dense), strict=True)
        for path, linear in linears.items()
    ]
    assert np.average([s for s, _ in given], weights=[size for _, size in given]) == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= s <= 0.95 for s, _ in given)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.model.state_dict().items())


def test_counts_as_published_still_are_possible_counts(tiny: Tiny) -> None:
    dense = load_model(str(tiny("llama")))
    allocated = allocate(dense, LsaProjection(0.3), 0.9, counts="paper")
    assert all(0 <= sparsity < 1 for block in allocated for sparsity in block.values())


def test_a_block_without_matrices_gets_none_and_disturbs_no_other(tiny: Tiny) -> None:
    dense = load_model(str(tiny("gemma3")))
    for path in projections(decoder_blocks(dense.model)["model.layers.1"]):
        parent, _, name = path.rpartition(".")
        owner = dense.model.get_submodule(f"model.layers.1.{parent}")
        linear = getattr(owner, name)
        setattr(owner, name, Doubled(linear))
    for budget in (Owl(), LsaProjection()):
        first, middle, last = allocate(dense, budget, 0.6)
        assert middle == {}
        assert set(first) == set(last) != set()


class Doubled(nn.Module):
    """Stands for a layer that cannot be pruned: its matrix is no `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix = linear.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.matrix)


@pytest.mark.parametrize("budget", [AlphaPruning(), LsaProjection()], ids=lambda budget: budget.name)
def test_weights_that_are_not_finite_are_named(budget: LayerBudget, tiny: Tiny) -> None:
    dense = load_model(str(tiny("llama")))
    dense.model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.mlp\.up_proj: NaN or infinity in its weights"):
        allocate(dense, budget, 0.5)
