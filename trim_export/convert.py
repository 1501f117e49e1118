"""Rewriting an artifact: in another encoding, as a plain dense model, or as scipy files.

Matrices pass through one at a time. Everything is written into a staging directory that takes its final name last.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from trim_export.artifact import INDEX, MANIFEST, REST, Artifact
from trim_export.artifact_writer import achieved_sparsity, sparse_config, write_index, write_manifest
from trim_export.converters import ENCODINGS, Bsr, Encoding, SparseMatrix, scipy
from trim_export.errors import UsageError, choose
from trim_export.format import guard
from trim_export.patterns import Blocks, parse_pattern
from trim_export.progress import Track, silently
from trim_export.storage import canonical_json, read_json, safe_file, write_bytes, write_tensors

__all__ = ["TARGETS", "convert", "staged", "write_dense"]


def convert(
    artifact: Artifact,
    target: str,
    out: Path,
    block: tuple[int, int] | None = None,
    track: Track[Any] = silently,
) -> dict[str, Any]:
    """Write ``artifact`` in another form into a new directory.

    Args:
        artifact: a finished artifact.
        target: a name in `TARGETS`: an encoding (the result is an artifact again), ``dense`` (a plain model directory
            with zeros, for any tool) or ``scipy`` (one ``.npz`` for each matrix and the other tensors).
        out: the directory to make; must not exist or be empty.
        block: rows and columns of a block, for ``bsr``; None is that of the artifact's pattern, if it has one.
        track: shows progress.

    Returns:
        What was written: target, directory, bytes before and after.

    Raises:
        UsageError: unknown target, a block without ``bsr``, or ``out`` in the way.
    """
    writer = choose("target", target, TARGETS)
    if block is not None and target != "bsr":
        raise UsageError(f"--block belongs to --to bsr, not to {target}")
    block = block or (pattern_block(artifact) if target == "bsr" else None)
    with staged(out) as staging:
        writer(artifact, staging, Bsr(block) if block else ENCODINGS.get(target), track)
    written = sum(file.stat().st_size for file in out.iterdir() if file.suffix in (".safetensors", ".npz"))
    before = artifact.manifest["bytes"]
    return {"target": target, "directory": str(out), "bytes": written, "bytes_before": before["artifact"],
            "bytes_dense": before["dense"]}  # fmt: skip


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``out`` if all goes well and else vanishes.

    Raises:
        UsageError: ``out`` exists and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists already; give another directory")
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def pattern_block(artifact: Artifact) -> tuple[int, int] | None:
    """The block of an artifact that was pruned in blocks, else None."""
    pattern = parse_pattern(artifact.manifest["run"]["recipe"].get("pattern", "none"))
    return (pattern.height, pattern.width) if isinstance(pattern, Blocks) else None


def _write_artifact(artifact: Artifact, out: Path, encoding: Encoding | None, track: Track[Any]) -> None:
    """The same artifact with every matrix in ``encoding``."""
    assert encoding is not None
    _copy_description(artifact, out, sparse_config(list(artifact.modules), encoding.name))
    modules: dict[str, dict[str, Any]] = {}

    def encode(name: str, matrix: SparseMatrix) -> dict[str, Tensor]:
        tensors = encoding.encode(matrix)
        # Blocks cannot tell a kept weight that is exactly zero from a pruned one, so counts may fall.
        modules[name] = artifact.modules[name] | {"nnz": encoding.decode(tensors, matrix.shape).nnz}
        return tensors

    _rewrite_shards(artifact, out, track, encode, guard(list(artifact.modules)))
    write_index(out)
    facts = {key: value for key, value in artifact.manifest.items() if key not in ("files", "bytes")}
    facts |= {"encoding": encoding.name, "modules": modules}
    facts["sparsity"] = achieved_sparsity(artifact.manifest["sparsity"]["target"], modules)
    write_manifest(out, facts, artifact.manifest["bytes"]["dense"])


def write_dense(artifact: Artifact, out: Path, encoding: Encoding | None, track: Track[Any]) -> None:
    """An ordinary model directory, every pruned weight a stored zero."""
    _copy_description(artifact, out, None)
    _rewrite_shards(artifact, out, track, lambda _, matrix: {"weight": matrix.to_dense()})
    write_index(out)


def _write_scipy(artifact: Artifact, out: Path, encoding: Encoding | None, track: Track[Any]) -> None:
    """``MODULE.npz`` for each matrix (scipy.sparse.load_npz), the remaining tensors in safetensors files."""
    _copy_description(artifact, out, None)
    for name, entry in track(list(artifact.modules.items()), "writing matrices"):
        scipy.save(out / f"{name}.npz", artifact.matrix(name, entry))
    for shard in artifact.shards:
        write_tensors(out / shard, artifact.dense_tensors(shard))


def _rewrite_shards(
    artifact: Artifact,
    out: Path,
    track: Track[Any],
    encode: Callable[[str, SparseMatrix], dict[str, Tensor]],
    more: dict[str, Tensor] | None = None,
) -> None:
    """Write each shard with its matrices encoded anew; ``more`` goes to the tensors that belong to no block."""
    for shard in track(artifact.shards, "writing shards"):
        tensors = artifact.dense_tensors(shard) | (more or {} if shard == REST else {})
        for name, entry in artifact.modules.items():
            if entry["file"] == shard:
                encoded = encode(name, artifact.matrix(name, entry))
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in encoded.items()}
        write_tensors(out / shard, tensors)


def _copy_description(artifact: Artifact, out: Path, quantization_config: dict[str, Any] | None) -> None:
    """Configuration and tokenizer; the weights, their index, the card and the manifest are made anew."""
    for name in artifact.manifest["files"]:
        if name.endswith(".safetensors") or name in (INDEX, MANIFEST, "README.md", "config.json"):
            continue
        write_bytes(out / name, safe_file(artifact.path, name).read_bytes())
    config = read_json(safe_file(artifact.path, "config.json"))
    config.pop("quantization_config", None)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    write_bytes(out / "config.json", canonical_json(config))


TARGETS: dict[str, Callable[[Artifact, Path, Encoding | None, Track[Any]], None]] = {
    "bitmap": _write_artifact,
    "csr": _write_artifact,
    "bsr": _write_artifact,
    "bitmap-4x64": _write_artifact,
    "g8": _write_artifact,
    "csr-interleaved": _write_artifact,
    "dense": write_dense,
    "scipy": _write_scipy,
}
"""What an artifact can be converted to."""
