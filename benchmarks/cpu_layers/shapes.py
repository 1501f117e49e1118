"""Layers of real models, and weights for them whose rows differ in density as pruned rows do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trim_export.converters import SparseMatrix

__all__ = ["SHAPES", "Shape", "random_matrix"]


@dataclass(frozen=True)
class Shape:
    """A linear layer of a model: ``rows`` outputs, ``columns`` inputs."""

    model: str
    rows: int
    columns: int


SHAPES = (
    Shape("SmolLM2-135M", 576, 576),
    Shape("SmolLM2-135M", 1536, 576),
    Shape("SmolLM2-135M", 576, 1536),
    Shape("Llama-2-7B", 4096, 4096),
    Shape("Llama-2-7B", 11008, 4096),
    Shape("Llama-2-7B", 4096, 11008),
    Shape("Llama-2-13B", 5120, 5120),
    Shape("Llama-2-13B", 13824, 5120),
    Shape("Llama-2-13B", 5120, 13824),
    Shape("Qwen2.5-7B", 3584, 3584),
    Shape("Qwen2.5-7B", 18944, 3584),
    Shape("Qwen2.5-7B", 3584, 18944),
)


def random_matrix(shape: Shape, sparsity: float, seed: int = 0) -> SparseMatrix:
    """Normal weights in float32 under a random mask; row densities are log-normal, from a twentieth to all but one."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(0.45 * torch.randn(shape.rows, 1, generator=generator))
    density = ((1 - sparsity) * spread / spread.mean()).clamp(0.02, 0.98)
    mask = torch.rand(shape.rows, shape.columns, generator=generator) < density
    return SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator))
