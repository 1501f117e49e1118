"""The driver: calibrate, score, allocate, mask and store, one decoder block at a time.

Inputs of a block come from the already pruned blocks before it. Each block is sent through twice, as the published
procedure does: once with its dense weights to gather statistics, once pruned to make the next block's inputs. Its
shard is on disk before the next block starts, so a killed run loses at most one block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import trim_export
from trim_export.artifact import Artifact, block_shard
from trim_export.artifact_writer import finish_artifact, load_shard_into, open_journal, write_block
from trim_export.calibration import source_name
from trim_export.converters import SparseMatrix
from trim_export.curves import curves
from trim_export.errors import ModelError
from trim_export.forward import BlockCall, Compute, block_calls, embed, run_block
from trim_export.layer_budgets import LayerBudget, recentre
from trim_export.models import DenseModel, decoder_blocks, dtype_name, projections, unprunable_matrices
from trim_export.recipe import Recipe
from trim_export.row_budgets import ROW_BUDGETS, keep_mask, uniform
from trim_export.scores import SCORES, wanda
from trim_export.statistics import InputStatistics, collect_inputs
from trim_export.storage import sha256_bytes
from trim_export.trim import ROW_CAP

__all__ = ["Track", "describe_run", "layer_sparsities", "prune", "prune_matrix"]

T = TypeVar("T")
Track = Callable[[Iterable[T], str], Iterable[T]]
"""Wraps an iteration to show its progress under a description."""

HISTOGRAM_BINS = 20


def prune(
    dense: DenseModel,
    recipe: Recipe,
    tokens: Tensor,
    out: Path,
    compute: Compute,
    resume: bool = False,
    track: Track[Any] = lambda items, description: items,
) -> Artifact:
    """Prune a model into an artifact directory.

    Args:
        dense: the model; its blocks are replaced by the pruned ones, so that afterwards it is the masked dense model.
        recipe: what to do.
        tokens: calibration windows, int64 ``[windows, tokens]``.
        out: the directory to write; must not exist unless ``resume``.
        compute: where and in which arithmetic the forward runs.
        resume: continue an unfinished run of exactly these settings; a finished one is returned as it is.
        track: shows progress.

    Raises:
        UsageError: ``out`` holds something else.
        ModelError: nothing to prune; or weights or activations that are not finite, naming block and layer.
    """
    blocks = decoder_blocks(dense.model)
    if not any(projections(block) for block in blocks.values()):
        others = unprunable_matrices(next(iter(blocks.values())))
        raise ModelError(f"{dense.source}: nothing to prune; its blocks have no nn.Linear, but {', '.join(others)}")
    run = describe_run(dense, recipe, tokens, compute)
    journal = open_journal(out, run, len(blocks), resume)
    if isinstance(journal, Artifact):
        return journal
    modules = list(blocks.values())
    calls = block_calls(dense.model, modules, tokens[:1])
    hidden = embed(dense.model, modules, tokens)
    if journal.sparsities is None:
        journal = journal.with_sparsities(layer_sparsities(recipe, blocks, calls, hidden, compute, track))
    assert journal.sparsities is not None
    for index, (name, block) in enumerate(track(list(blocks.items()), "pruning")):
        block.to(compute.device)
        if block_shard(index) in journal.shards:
            load_shard_into(block, name, out / block_shard(index), journal.shards[block_shard(index)])
        else:
            pruned, reports = _prune_block(
                name, block, calls[index], hidden, journal.sparsities[index], recipe, compute
            )
            journal = write_block(journal, index, name, block, pruned, reports)
        if index + 1 < len(blocks):
            hidden = run_block(block, calls[index], hidden, compute)
        block.to("cpu")
    return finish_artifact(journal, dense, blocks)


def prune_matrix(
    weight: Tensor, inputs: InputStatistics, sparsity: float, recipe: Recipe
) -> tuple[SparseMatrix, dict[str, Any]]:
    """Score, allocate and mask one matrix ``[rows, columns]``.

    Returns:
        The kept weights in the dtype of ``weight``, and the matrix's entry in the manifest.
    """
    exact = weight.float()
    score = SCORES[recipe.score](exact, inputs)
    order = score.argsort(dim=1, stable=True)
    layer_curves = functools.partial(curves, exact, order, inputs.last_tokens)
    plan = ROW_BUDGETS[recipe.rows](score, layer_curves, sparsity, recipe.policy)
    mask = keep_mask(order, plan.pruned)
    even = keep_mask(order, uniform(score, layer_curves, sparsity, recipe.policy).pruned)
    report = {
        **row_report(mask),
        "target_sparsity": sparsity,
        "cosine": _output_cosine(exact, mask, inputs.last_tokens),
        "cosine_uniform": _output_cosine(exact, even, inputs.last_tokens),
        "learning_rate": plan.learning_rate,
    }
    return SparseMatrix.from_dense(weight, mask), report


def layer_sparsities(
    recipe: Recipe,
    blocks: Mapping[str, nn.Module],
    calls: list[BlockCall],
    hidden: Tensor,
    compute: Compute,
    track: Track[Any],
) -> list[float]:
    """The block budget: measure every dense block, then allocate. Runs the dense model only if the budget asks."""
    budget: LayerBudget = recipe.layers
    if budget.name == "uniform":
        return [recipe.sparsity] * len(blocks)
    measures, sizes = [], []
    for (name, block), call in zip(track(list(blocks.items()), f"measuring for {budget.name}"), calls, strict=True):
        block.to(compute.device)
        linears = projections(block)
        weights = {path: linear.weight.float() for path, linear in linears.items()}
        scores = {}
        if budget.needs_inputs:
            following: list[Tensor] = []
            inputs = _collect(name, block, linears, call, hidden, compute, following)
            scores = {path: wanda(weight, inputs[path]) for path, weight in weights.items()}
            hidden = following[0]
        measures.append(budget.measure(weights, scores))
        sizes.append(sum(weight.numel() for weight in weights.values()))
        block.to("cpu")
    allocated = budget.allocate(measures, sizes, recipe.sparsity)
    if recipe.counts == "paper":
        return allocated
    return recentre(allocated, sizes, recipe.sparsity, max(ROW_CAP, recipe.sparsity))


def describe_run(dense: DenseModel, recipe: Recipe, tokens: Tensor, compute: Compute) -> dict[str, Any]:
    """Everything that decides the artifact's bytes, as JSON: compared when a run is resumed."""
    return {
        "tool_version": trim_export.__version__,
        "torch_version": torch.__version__,
        "source": {"model": source_name(dense.source), "sha256": dense.sha256, "dtype": dtype_name(dense.model.dtype)},
        "recipe": recipe.as_json() | {"calibration": source_name(recipe.calibration)},
        "calibration_sha256": sha256_bytes(tokens.cpu().numpy().tobytes()),
        "compute": {"device": compute.device.type, "autocast_bfloat16": compute.autocast},
    }


def row_report(mask: Tensor) -> dict[str, Any]:
    """Counts of a mask as the manifest stores them: shape, nnz, and how the row sparsities are distributed."""
    rows, columns = mask.shape
    sparsities = 1 - mask.sum(dim=1).cpu().double() / columns
    return {
        "shape": [rows, columns],
        "nnz": int(mask.sum()),
        "row_sparsity": {
            "min": float(sparsities.min()),
            "median": float(sparsities.median()),
            "max": float(sparsities.max()),
            "histogram": torch.histc(sparsities, HISTOGRAM_BINS, min=0, max=1).long().tolist(),
        },
    }


def _prune_block(
    name: str, block: nn.Module, call: BlockCall, hidden: Tensor, sparsity: float, recipe: Recipe, compute: Compute
) -> tuple[dict[str, SparseMatrix], dict[str, dict[str, Any]]]:
    """Prune every projection of one block in place."""
    linears = projections(block)
    for path, linear in linears.items():
        if not bool(linear.weight.isfinite().all()):
            raise ModelError(f"{name}.{path}: NaN or infinity in its weights; they cannot be scored")
    inputs = _collect(name, block, linears, call, hidden, compute)
    pruned, reports = {}, {}
    for path, linear in linears.items():
        pruned[path], reports[path] = prune_matrix(linear.weight.data, inputs[path], sparsity, recipe)
        linear.weight.data = pruned[path].to_dense()
    return pruned, reports


def _collect(
    name: str,
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    call: BlockCall,
    hidden: Tensor,
    compute: Compute,
    outputs: list[Tensor] | None = None,
) -> dict[str, InputStatistics]:
    """Input statistics of one block as it stands; its outputs are appended to ``outputs`` when a list is given."""

    def run() -> None:
        following = run_block(block, call, hidden, compute)
        if outputs is not None:
            outputs.append(following)

    return collect_inputs(block, linears, run, name)


def _output_cosine(weight: Tensor, mask: Tensor, inputs: Tensor) -> float:
    """Cosine between the dense and the masked outputs of a whole layer."""
    dense, masked = weight @ inputs, (weight * mask) @ inputs
    return float(torch.nn.functional.cosine_similarity(dense.flatten().double(), masked.flatten().double(), dim=0))
