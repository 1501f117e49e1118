"""What a pruning run will need, predicted from the configuration before any weight is read."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from trim_export.forward import TOKENS_PER_BATCH, Compute
from trim_export.models import decoder_blocks, projections
from trim_export.recipe import Recipe

__all__ = ["Plan", "predict"]

PRODUCTS = {"none": 0, "refit": 12, "sparsegpt": 4, "admm": 32, "fista": 80}
"""About how many products rows x columns x columns each weight update makes for a matrix."""

PROCESS_BYTES = 700_000_000
"""Python with torch and transformers imported, before a model is loaded (measured: 0.6 to 0.7 GB)."""


@dataclass(frozen=True)
class Plan:
    """Predictions; none of these is a measurement of the run itself.

    Attributes:
        parameters: of the model, tied ones once.
        prunable: weights in pruned matrices.
        dense_bytes: weight files of the dense model.
        artifact_bytes: weight files of the artifact.
        peak_memory_bytes: of the host process.
        seconds: of pruning, from a short matrix multiplication on this machine.
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


def predict(skeleton: nn.Module, dtype: torch.dtype, recipe: Recipe, compute: Compute) -> Plan:
    """Predict from a model on the meta device.

    Args:
        skeleton: the model without its weights.
        dtype: that it will be loaded in.
        recipe: what will be done.
        compute: where the forward will run.
    """
    blocks = list(decoder_blocks(skeleton).values())
    matrices = [linear.weight for block in blocks for linear in projections(block).values()]
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    prunable = sum(matrix.numel() for matrix in matrices)
    dense_bytes = parameters * dtype.itemsize
    mask_bytes = sum(matrix.shape[0] * -(-matrix.shape[1] // 8) for matrix in matrices)
    artifact_bytes = dense_bytes - round(prunable * recipe.sparsity * dtype.itemsize) + mask_bytes
    tokens = recipe.samples * recipe.sequence_length
    widest = max(max(matrix.shape) for matrix in matrices)
    features = skeleton.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
    hidden = 2 * tokens * features * dtype.itemsize
    batch = 8 * min(tokens, TOKENS_PER_BATCH) * widest * 4
    # The largest matrix at once as float32 weight, score, int64 order, its mask, and the curves' two arrays.
    search = max(matrix.numel() for matrix in matrices) * (4 + 4 + 8 + 8 + 4 + 8)
    # A decoder pass multiplies every weight with every token; a third more goes into attention and norms.
    passes = 3 if recipe.layers.needs_inputs else 2
    operations = 1.3 * 2 * prunable * tokens * passes
    if recipe.update != "none":
        # The dense stream, a partial pass for each group of layers, and two Gram matrices of each distinct input: three
        # as wide as the residual stream (attention, its output, the MLP) and one as wide as the MLP.
        inputs = [features, features, features, max(matrix.shape[1] for matrix in matrices)]
        operations += 1.3 * 2 * prunable * tokens * 1.4
        operations += len(blocks) * sum(4.0 * tokens * width**2 for width in inputs)
        operations += sum(2.0 * PRODUCTS[recipe.update] * m.numel() * m.shape[1] for m in matrices)
        hidden += tokens * (sum(inputs) + 2 * features) * 4
        search += 3 * widest**2 * 4 + 10 * max(matrix.numel() for matrix in matrices) * 4
    return Plan(
        parameters=parameters,
        prunable=prunable,
        dense_bytes=dense_bytes,
        artifact_bytes=artifact_bytes,
        peak_memory_bytes=PROCESS_BYTES + dense_bytes + hidden + batch + search,
        seconds=operations / _multiplication_rate(compute, dtype),
    )


@torch.no_grad()
def _multiplication_rate(compute: Compute, dtype: torch.dtype) -> float:
    """Operations per second of a matrix multiplication like those of the forward pass."""
    dtype = torch.bfloat16 if compute.autocast else dtype
    left = torch.randn(2048, 1024, device=compute.device).to(dtype)
    right = torch.randn(1024, 1024, device=compute.device).to(dtype)
    (left @ right).sum().item()
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - begin)
    return 2 * left.shape[0] * left.shape[1] * right.shape[1] / best
