"""What a pruning run will need, predicted from the configuration before any weight is read.

Time is counted in multiplications, of which matrix products make nearly all, and divided by the speed of a short
product on this machine. What a run takes beside products is in the constants below, which are fitted to measured runs:
after a change that makes pruning faster or slower they are what to adjust.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.allocation import LEAST_TOKENS
from trim_export.forward import TOKENS_PER_BATCH, Compute
from trim_export.layer_budgets import Auto, split_sequences
from trim_export.models import decoder_blocks, projections
from trim_export.recipe import Recipe
from trim_export.row_budgets import ROW_BUDGETS
from trim_export.scores import SCORES
from trim_export.updates import UPDATES, Admm

__all__ = ["Plan", "predict"]

PRODUCTS = {"none": 0, "refit": 12, "sparsegpt": 4, "fista": 80} | {
    name: update.iterations + update.polish + 2 for name, update in UPDATES.items() if isinstance(update, Admm)
}
"""About how many products rows x columns x columns each weight update makes for a matrix."""

FORWARD = 1.35
"""Time of a decoder block's forward pass in that of its matrix products; the rest is attention and norms."""

UPDATE_PASSES = 0.15
"""Passes that an update adds to the dense and the pruned one: parts of the block again for each group of layers."""

UPDATE_OPERATIONS = 3.5e4
"""Work of an update for each weight beside its products: inverses, selections, sums (from measured runs of SmolLM2)."""

UPDATE_COPIES = 1.8
"""How often an update holds each of a block's inputs and both streams (from two measured peaks of SmolLM2)."""

GRAM_PRODUCTS = 1.3
"""Products tokens x columns x columns for each distinct input of a block: half its Gram matrix, and the target."""

BACKWARD_PASSES = 3.0
"""A backward pass with its forward pass, in forward passes."""

SEARCH_OPERATIONS = 3.5e3
"""Work of a row budget's search for each weight, in operations (TRIM: 11.5 ms for 331 776 weights, at 100 G/s)."""

PROCESS_BYTES = 700_000_000
"""Python with torch and transformers imported, before a model is loaded (measured: 0.6 to 0.7 GB)."""

THREAD_YIELD = 0.95
"""Speed that each thread of the processor adds to a matrix product, in that of one thread alone."""

LARGE_PRODUCTS = 0.7
"""Speed of products that no cache holds, in that of the short ones of the probe (107 and 155 G/s on two cores)."""


@dataclass(frozen=True)
class Plan:
    """Predictions; none of these is a measurement of the run itself.

    Attributes:
        parameters: of the model, tied ones once.
        prunable: weights in pruned matrices.
        dense_bytes: weight files of the dense model.
        artifact_bytes: weight files of the artifact.
        peak_memory_bytes: of the host process.
        seconds: of pruning, when nothing else runs on this machine.
    """

    parameters: int
    prunable: int
    dense_bytes: int
    artifact_bytes: int
    peak_memory_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Shapes:
    """What of a model decides costs.

    Attributes:
        blocks: number of decoder blocks.
        matrices: rows and columns of each prunable matrix.
        features: of the residual stream.
        vocabulary: rows of the LM head.
    """

    blocks: int
    matrices: Sequence[tuple[int, int]]
    features: int
    vocabulary: int

    @property
    def prunable(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def largest(self) -> int:
        return max(rows * columns for rows, columns in self.matrices)

    @property
    def widest(self) -> int:
        return max(max(sides) for sides in self.matrices)

    @property
    def inputs(self) -> list[int]:
        """Widths of a block's distinct inputs: three of the residual stream's (attention, its output, MLP), one of the
        MLP's."""
        return [self.features, self.features, self.features, max(columns for _, columns in self.matrices)]


def predict(skeleton: nn.Module, dtype: torch.dtype, recipe: Recipe, compute: Compute) -> Plan:
    """Predict from a model on the meta device.

    Args:
        skeleton: the model without its weights.
        dtype: that it will be loaded in.
        recipe: what will be done.
        compute: where the forward will run.
    """
    blocks = list(decoder_blocks(skeleton).values())
    weights: list[Tensor] = [linear.weight for block in blocks for linear in projections(block).values()]
    config = skeleton.config.get_text_config()  # type: ignore[operator, union-attr]
    shapes = _Shapes(
        len(blocks), [(int(w.shape[0]), int(w.shape[1])) for w in weights], config.hidden_size, config.vocab_size
    )
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    dense_bytes = parameters * dtype.itemsize
    mask_bytes = sum(rows * -(-columns // 8) for rows, columns in shapes.matrices)
    return Plan(
        parameters=parameters,
        prunable=shapes.prunable,
        dense_bytes=dense_bytes,
        artifact_bytes=dense_bytes - round(shapes.prunable * recipe.sparsity * dtype.itemsize) + mask_bytes,
        peak_memory_bytes=PROCESS_BYTES + dense_bytes + _working_bytes(shapes, dtype, recipe),
        seconds=_operations(shapes, recipe) / _multiplication_rate(compute, dtype),
    )


def _operations(shapes: _Shapes, recipe: Recipe) -> float:
    """Of a whole run: scores that need gradients, the layer budget, and the sweep over the blocks."""
    tokens = recipe.samples * recipe.sequence_length
    operations = _sweep(shapes, recipe, tokens)
    if SCORES[recipe.score].needs_gradients:
        operations += BACKWARD_PASSES * _model_pass(shapes, tokens)
    if recipe.layers.needs_inputs:
        operations += _block_pass(
            shapes, tokens if recipe.counts == "paper" else max(tokens // 4, min(tokens, LEAST_TOKENS))
        )
    if isinstance(recipe.layers, Auto):
        sequence = max(recipe.sequence_length, recipe.context_length)
        trial, held_out = split_sequences(max(tokens // sequence, 8))
        each = _sweep(shapes, recipe, trial * sequence) + _model_pass(shapes, held_out * sequence)
        operations += len(recipe.layers.candidates) * each + _model_pass(shapes, held_out * sequence)
    return operations


def _sweep(shapes: _Shapes, recipe: Recipe, tokens: int) -> float:
    """Prune every block once, on so many tokens."""
    operations = 2 * _block_pass(shapes, tokens)
    if ROW_BUDGETS[recipe.rows].capped:  # those that search
        operations += SEARCH_OPERATIONS * shapes.prunable
    if recipe.update != "none":
        operations += UPDATE_PASSES * _block_pass(shapes, tokens) + UPDATE_OPERATIONS * shapes.prunable
        operations += shapes.blocks * sum(GRAM_PRODUCTS * 2 * tokens * width**2 for width in shapes.inputs)
        operations += PRODUCTS[recipe.update] * sum(2.0 * rows * columns**2 for rows, columns in shapes.matrices)
    return operations


def _block_pass(shapes: _Shapes, tokens: int) -> float:
    """All decoder blocks once over so many tokens."""
    return FORWARD * 2 * shapes.prunable * tokens


def _model_pass(shapes: _Shapes, tokens: int) -> float:
    """The same and the LM head."""
    return _block_pass(shapes, tokens) + 2.0 * shapes.vocabulary * shapes.features * tokens


def _working_bytes(shapes: _Shapes, dtype: torch.dtype, recipe: Recipe) -> int:
    """What pruning holds beside the model at its worst moment."""
    tokens = recipe.samples * recipe.sequence_length
    hidden = 2 * tokens * shapes.features * dtype.itemsize
    batch = 8 * min(tokens, TOKENS_PER_BATCH) * shapes.widest * 4
    # The largest matrix at once as float32 weight, score, int64 order, its mask, and the curves' two arrays.
    search = shapes.largest * (4 + 4 + 8 + 8 + 4 + 8)
    if recipe.update != "none":
        hidden += round(UPDATE_COPIES * tokens * (sum(shapes.inputs) + 2 * shapes.features) * 4)
        search += 3 * shapes.widest**2 * 4 + 10 * shapes.largest * 4
    total = hidden + batch + search
    if SCORES[recipe.score].needs_gradients:
        total += shapes.prunable * 4
    if isinstance(recipe.layers, Auto):
        total += shapes.prunable * dtype.itemsize
        total += max(recipe.sequence_length, recipe.context_length) * shapes.vocabulary * 8
    return total


@torch.no_grad()
def _multiplication_rate(compute: Compute, dtype: torch.dtype) -> float:
    """Operations per second of matrix products like those of pruning, once nothing else needs the machine.

    On a processor the best of many short products on one thread counts, times the threads: a product that takes a
    millisecond or two is seldom interrupted, so a machine that is a little busy now is not taken for a slow one.
    """
    dtype = torch.bfloat16 if compute.autocast else dtype
    on_host = compute.device.type == "cpu"
    rows, columns = (128, 576) if on_host else (4096, 4096)
    left = torch.randn(rows, columns, device=compute.device).to(dtype)
    right = torch.randn(columns, columns, device=compute.device).to(dtype)
    threads = torch.get_num_threads()
    try:
        if on_host:
            torch.set_num_threads(1)
        best, end = float("inf"), time.perf_counter() + 1.0
        while time.perf_counter() < end:
            begin = time.perf_counter()
            product = left @ right
            if not on_host:
                product[0, 0].item()  # waits for it
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    alone = 2 * rows * columns**2 / best
    return LARGE_PRODUCTS * alone * (1 + THREAD_YIELD * (threads - 1)) if on_host else alone
