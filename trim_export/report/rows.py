"""How the kept weights of an artifact are spread over the rows of its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trim_export.artifact import Artifact
from trim_export.report.words import in_order

__all__ = ["MatrixRows", "gini", "matrix_rows"]


@dataclass(frozen=True)
class MatrixRows:
    """One pruned matrix as the pictures show it.

    Attributes:
        name: of the module.
        block: index of its decoder block; None outside the blocks (the LM head).
        projection: its name inside the block, ``q_proj``.
        sparsities: float64 ``[rows]``, ascending: share of each row's weights that is pruned.
        gini: concentration of the kept weights on few rows (`gini`).
        entry: what the manifest says of it.
    """

    name: str
    block: int | None
    projection: str
    sparsities: NDArray[np.float64]
    gini: float
    entry: dict[str, Any]


def matrix_rows(artifact: Artifact) -> list[MatrixRows]:
    """Count every matrix, block by block."""
    found = []
    for name, entry in in_order(artifact.modules):
        kept = artifact.row_counts(name, entry)
        sparsities = np.sort(1 - kept / entry["shape"][1])
        block = _block(entry["file"])
        found.append(MatrixRows(name, block, _projection(name, block), sparsities, gini(kept), entry))
    return found


def gini(counts: NDArray[Any]) -> float:
    """Gini coefficient of counts that are not negative: 0 if all are equal, towards 1 if one has all; 0 of zeros."""
    ordered = np.sort(counts.astype(np.float64))
    total, number = ordered.sum(), len(ordered)
    if total == 0:
        return 0.0
    places = np.arange(1, number + 1)
    return float((2 * places - number - 1) @ ordered / (number * total))


def _block(shard: str) -> int | None:
    index = shard.removeprefix("block-").removesuffix(".safetensors")
    return int(index) if index.isdigit() else None


def _projection(name: str, block: int | None) -> str:
    """Its name inside the block."""
    inside = name.partition(f".{block}.")[2] if block is not None else ""
    return inside or name
