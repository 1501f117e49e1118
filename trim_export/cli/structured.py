"""The structured step of ``trim-export prune``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_export.cli.common import measure_data, out, track
from trim_export.errors import UsageError, choose

if TYPE_CHECKING:
    from torch import Tensor

    from trim_export.forward import Compute
    from trim_export.models import DenseModel
    from trim_export.structured import StructuredMethod

__all__ = ["Step", "require_vacant", "store_reduced", "structured_step"]


@dataclass(frozen=True)
class Step:
    """What ``--structured`` and ``--remove`` ask for."""

    method: StructuredMethod
    share: float

    def run(self, dense: DenseModel, tokens: Tensor, compute: Compute, seed: int) -> DenseModel:
        """Shrink the model in place."""
        from trim_export.structured import reduce_model

        return reduce_model(dense, self.method, self.share, tokens, compute, seed, track)


def structured_step(name: str | None, share: float | None, sparsity: float | None) -> Step | None:
    """The step, or None where none is asked for.

    Raises:
        UsageError: options that do not go together.
    """
    if name is None:
        if share is not None:
            raise UsageError("--remove needs --structured NAME, as in --structured pip")
        if sparsity is None:
            raise UsageError("give --sparsity, or --structured with --remove, or both")
        return None
    from trim_export.structured import STRUCTURED

    method = choose("structured method", name, STRUCTURED)
    if share is None:
        raise UsageError(f"--structured {name} needs --remove SHARE, as in --remove 0.2")
    if not 0 < share < 1:
        raise UsageError(f"--remove {share:g} is outside (0, 1)")
    return Step(method, share)


def require_vacant(output: Path, overwrite: bool) -> None:
    """Refuse a taken output directory before anything is loaded."""
    from trim_export.structured import require_vacant

    require_vacant(output, overwrite)


def store_reduced(
    dense: DenseModel,
    output: Path,
    overwrite: bool,
    text: str | None,
    spent: tuple[dict[str, Any], list[tuple[str, str]]],
) -> dict[str, Any]:
    """Write the smaller dense model, say what became of it, and give that back as JSON."""
    from trim_export.report import facts, structured_table
    from trim_export.structured import save_reduced

    assert dense.structured is not None
    save_reduced(dense, output, overwrite)
    out.print(structured_table(dense.structured))
    measured, rows = spent
    if text is not None:
        measured["perplexity"], row = measure_data(dense.model, dense.tokenizer, text)
        rows.append(row)
    out.print(facts("this run", rows))
    return {"model": str(output), "structured": dense.structured, **measured}
