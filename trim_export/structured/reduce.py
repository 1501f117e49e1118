"""The structured step of a run: shrink a model, remember how, and store it as an ordinary one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from trim_export.errors import ModelError, UsageError
from trim_export.forward import Compute
from trim_export.models import RECORD, DenseModel, weight_bytes
from trim_export.progress import Track, silently
from trim_export.storage import canonical_json, sha256_bytes, write_bytes
from trim_export.structured.depth import remove_blocks
from trim_export.structured.method import StructuredMethod

__all__ = ["RECORD", "reduce_model", "replay", "require_vacant", "save_reduced"]


def reduce_model(
    dense: DenseModel,
    method: StructuredMethod,
    share: float,
    tokens: Tensor,
    compute: Compute,
    seed: int = 0,
    track: Track[Any] = silently,
) -> DenseModel:
    """Remove a share of a model's parameters, in place.

    Args:
        dense: the model.
        method: chooses what goes.
        share: of all parameters, in (0, 1).
        tokens: calibration windows, int64 ``[windows, tokens]``.
        compute: where the passes run.
        seed: of what the method draws.
        track: shows progress.

    Returns:
        The same model, with a record of the step that an artifact's manifest will repeat.

    Raises:
        UsageError: the share is impossible, or the model went through a structured step before.
    """
    if not 0 < share < 1:
        raise UsageError(f"--remove {share:g} is outside (0, 1)")
    if dense.structured is not None:
        raise UsageError(f"{dense.source}: has been through {dense.structured['method']} already; give the dense model")
    bytes_before, parameters = weight_bytes(dense.model), dense.model.num_parameters()
    removed = method(dense, tokens, share, seed, compute, track)
    left = dense.model.num_parameters()
    record = {
        "method": method.name,
        "settings": {name: value for name, value in vars(method).items() if name != "name"},
        "asked": share,
        "removed": removed,
        "share": 1 - left / parameters,
        "seed": seed,
        "calibration_sha256": sha256_bytes(tokens.cpu().numpy().tobytes()),
        "source_bytes": bytes_before,
        "bytes": weight_bytes(dense.model),
    }
    return dataclasses.replace(dense, structured=record)


def replay(dense: DenseModel, record: dict[str, Any]) -> DenseModel:
    """Remove from a whole model, in place, the blocks that a record names.

    Raises:
        ModelError: a record of channels, which does not say which they were.
    """
    if "blocks" not in record["removed"]:
        raise ModelError(
            f"{dense.source}: what {record['method']} removed cannot be repeated from the manifest; prune in two "
            "steps, first with --structured alone, and give the model in between"
        )
    remove_blocks(dense.model, record["removed"]["blocks"])
    return dataclasses.replace(dense, structured=record)


def require_vacant(out: Path, overwrite: bool) -> None:
    """Refuse an output directory that is taken; touches nothing.

    Raises:
        UsageError: something is in the way, and it is not an earlier such model that may be overwritten.
    """
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not (overwrite and (out / RECORD).is_file()):
        raise UsageError(f"{out}: exists already; give another directory, or --overwrite for a model like this one")


def save_reduced(dense: DenseModel, out: Path, overwrite: bool = False) -> None:
    """Write a model directory for any tool, with the record of its structured step; whole or not at all.

    Raises:
        UsageError: as for `require_vacant`.
    """
    require_vacant(out, overwrite)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        dense.model.save_pretrained(staging)
        dense.tokenizer.save_pretrained(staging)
        write_bytes(staging / RECORD, canonical_json(dense.structured))
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
