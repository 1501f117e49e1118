"""The driver: calibrate, allocate, sweep over the decoder blocks, and store each as soon as it is pruned.

Inputs of a block come from the already pruned blocks before it; when kept weights are updated, the dense model's own
stream runs beside them. What happens inside a block is in `trim_export.prune_block`. A block's shard is on disk before
the next block starts, so a killed run loses at most one block.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trim_export
from trim_export.allocation import layer_sparsities
from trim_export.artifact import HEAD, Artifact, block_shard
from trim_export.artifact_writer import finish_artifact, load_shard_into, open_journal, write_unit
from trim_export.auto_budget import choose_budget
from trim_export.calibration import source_name
from trim_export.errors import ModelError
from trim_export.forward import Compute, block_calls, embed, finish_forward
from trim_export.gradients import gradient_norms
from trim_export.layer_budgets import Auto, split_sequences
from trim_export.models import (
    DenseModel,
    decoder_blocks,
    dtype_name,
    output_head,
    projections,
    unprunable_matrices,
    weight_bytes,
)
from trim_export.packing import pack_windows, read_apart, unpacked
from trim_export.patterns import parse_pattern, require_fit
from trim_export.progress import Track, silently
from trim_export.prune_block import prune_matrix, require_finite_weight
from trim_export.recipe import Recipe
from trim_export.scores import SCORES
from trim_export.statistics import input_statistics
from trim_export.storage import sha256_bytes
from trim_export.sweep import sweep_blocks

__all__ = ["describe_run", "prune"]


def prune(
    dense: DenseModel,
    recipe: Recipe,
    tokens: Tensor,
    out: Path,
    compute: Compute,
    resume: bool = False,
    track: Track[Any] = silently,
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
        UsageError: ``out`` holds something else, a matrix cannot have the recipe's pattern, or there are too few
            windows to choose a layer budget by trial.
        ModelError: nothing to prune; or weights or activations that are not finite, naming block and layer.
    """
    blocks = decoder_blocks(dense.model)
    if not any(projections(block) for block in blocks.values()):
        others = unprunable_matrices(next(iter(blocks.values())))
        raise ModelError(f"{dense.source}: nothing to prune; its blocks have no nn.Linear, but {', '.join(others)}")
    shapes = [
        (f"{name}.{path}", (linear.out_features, linear.in_features))
        for name, block in blocks.items()
        for path, linear in projections(block).items()
    ]
    require_fit(parse_pattern(recipe.pattern), shapes)
    packed = pack_windows(tokens, recipe.context_length, dense.model)
    if isinstance(recipe.layers, Auto):
        split_sequences(len(packed.tokens))
    run = describe_run(dense, recipe, tokens, compute)
    journal = open_journal(out, run, len(blocks), resume)
    if isinstance(journal, Artifact):
        return journal
    modules = list(blocks.values())
    calls = block_calls(dense.model, modules, packed.tokens[:1], packed.positions, packed.joined)
    if packed.positions is not None and not read_apart(calls, packed.positions):
        packed = unpacked(tokens)
        calls = block_calls(dense.model, modules, packed.tokens[:1])
    hidden = embed(dense.model, modules, packed.tokens, packed.positions)
    gradients: dict[str, dict[str, Tensor]] = {}
    if SCORES[recipe.score].needs_gradients and len(journal.shards) < len(blocks):
        gradients = gradient_norms(dense.model, blocks, tokens, compute, track)
    if journal.sparsities is None:
        budget, choice = recipe.layers, None
        if isinstance(budget, Auto):
            budget, choice = choose_budget(
                budget, dense.model, recipe, blocks, calls, packed.tokens, hidden, gradients, compute, track
            )
        sparsities = layer_sparsities(budget, recipe, blocks, calls, hidden, compute, track)
        journal = journal.with_sparsities(sparsities, choice)
    assert journal.sparsities is not None
    finished = {
        name: functools.partial(load_shard_into, name=name, file=out / shard, entry=journal.shards[shard])
        for name, shard in zip(blocks, map(block_shard, range(len(blocks))), strict=True)
        if shard in journal.shards
    }
    for swept in sweep_blocks(
        blocks, calls, hidden, journal.sparsities, gradients, recipe, compute, track, finished=finished
    ):
        if swept.pruned is not None:
            journal = write_unit(journal, block_shard(swept.index), swept.name, swept.block, *swept.pruned)
        hidden = swept.hidden
    units = dict(blocks)
    if recipe.head:
        name, head = output_head(dense.model)
        require_finite_weight(head, name)
        units[name] = head
        inputs = input_statistics(
            finish_forward(dense.model, modules, calls, packed.tokens, hidden), name, packed.joined
        )
        matrix, report = prune_matrix(head.weight.data, inputs, recipe.sparsity, recipe)
        head.weight.data = matrix.to_dense()
        journal = write_unit(journal, HEAD, name, head, {"": matrix}, {"": report})
    return finish_artifact(journal, dense, units)


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
            **({} if dense.structured is None else {"structured": dense.structured}),
        },
        "recipe": recipe.as_json() | {"calibration": source_name(recipe.calibration)},
        "calibration_sha256": sha256_bytes(tokens.cpu().numpy().tobytes()),
        "compute": {"device": compute.device.type, "autocast_bfloat16": compute.autocast},
    }
