"""The driver: calibrate, score, allocate, mask and store, one decoder block at a time.

Inputs of a block come from the already pruned blocks before it; when kept weights are updated, the dense model's own
stream runs beside them. What happens inside a block is in `trim_export.prune_block`. A block's shard is on disk before
the next block starts, so a killed run loses at most one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import trim_export
from trim_export.artifact import HEAD, Artifact, block_shard
from trim_export.artifact_writer import finish_artifact, load_shard_into, open_journal, write_unit
from trim_export.calibration import source_name
from trim_export.errors import ModelError
from trim_export.forward import BlockCall, Compute, block_calls, embed, finish_forward, run_block
from trim_export.gradients import gradient_norms
from trim_export.layer_budgets import LayerBudget, recentre
from trim_export.models import (
    DenseModel,
    decoder_blocks,
    dtype_name,
    output_head,
    projections,
    unprunable_matrices,
    weight_bytes,
)
from trim_export.prune_block import mask_block, prune_matrix, require_finite_weight, update_block
from trim_export.recipe import Recipe
from trim_export.scores import SCORES, wanda
from trim_export.statistics import InputStatistics, collect_inputs, input_statistics
from trim_export.storage import sha256_bytes
from trim_export.trim import ROW_CAP

__all__ = ["Track", "describe_run", "layer_sparsities", "prune"]

T = TypeVar("T")
Track = Callable[[Iterable[T], str], Iterable[T]]
"""Wraps an iteration to show its progress under a description."""


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
    gradients: dict[str, dict[str, Tensor]] = {}
    if SCORES[recipe.score].needs_gradients and len(journal.shards) < len(blocks):
        gradients = gradient_norms(dense.model, blocks, tokens, compute, track)
    updates = recipe.update != "none"
    dense_hidden = hidden  # the dense model's own stream, carried along when kept weights are fitted to it
    for index, (name, block) in enumerate(track(list(blocks.items()), "pruning")):
        block.to(compute.device)
        shard = block_shard(index)
        if shard in journal.shards:
            if updates:
                dense_hidden = run_block(block, calls[index], dense_hidden, compute)
            load_shard_into(block, name, out / shard, journal.shards[shard])
        else:
            call, sparsity = calls[index], journal.sparsities[index]
            norms = {path: norm.to(compute.device) for path, norm in gradients.pop(name, {}).items()}
            if updates:
                pruned, dense_hidden = update_block(
                    name, block, call, hidden, dense_hidden, norms, sparsity, recipe, compute
                )
            else:
                pruned = mask_block(name, block, call, hidden, norms, sparsity, recipe, compute)
            journal = write_unit(journal, shard, name, block, *pruned)
        if index + 1 < len(blocks) or recipe.head:
            hidden = run_block(block, calls[index], hidden, compute)
        block.to("cpu")
    units = dict(blocks)
    if recipe.head:
        name, head = output_head(dense.model)
        require_finite_weight(head, name)
        units[name] = head
        inputs = input_statistics(finish_forward(dense.model, modules, calls, tokens, hidden), name)
        matrix, report = prune_matrix(head.weight.data, inputs, recipe.sparsity, recipe)
        head.weight.data = matrix.to_dense()
        journal = write_unit(journal, HEAD, name, head, {"": matrix}, {"": report})
    return finish_artifact(journal, dense, units)


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
        weights = {path: linear.weight.float() for path, linear in projections(block).items()}
        scores = {}
        if budget.needs_inputs:
            inputs, hidden = _observe(name, block, call, hidden, compute)
            scores = {path: wanda(weight, inputs[path]) for path, weight in weights.items()}
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
        "source": {
            "model": source_name(dense.source),
            "sha256": dense.sha256,
            "dtype": dtype_name(dense.model.dtype),
            "bytes": weight_bytes(dense.model),
        },
        "recipe": recipe.as_json() | {"calibration": source_name(recipe.calibration)},
        "calibration_sha256": sha256_bytes(tokens.cpu().numpy().tobytes()),
        "compute": {"device": compute.device.type, "autocast_bfloat16": compute.autocast},
    }


def _observe(
    name: str, block: nn.Module, call: BlockCall, hidden: Tensor, compute: Compute
) -> tuple[dict[str, InputStatistics], Tensor]:
    """Input statistics of a block as it stands, and its output."""
    outputs: list[Tensor] = []
    inputs = collect_inputs(
        block, projections(block), lambda: outputs.append(run_block(block, call, hidden, compute)), name
    )
    return inputs, outputs[0]
