"""An artifact as a directory that ONNX Runtime and onnxruntime-genai load.

    dense model  ->  dense graph (`converters.onnx.base`)  ->  sparse constants (`converters.onnx.sparsify`)

The dense model lies on the disk in between, and in memory once, in the exporter's process.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trim_export
from trim_export.artifact import CONFIG, Artifact
from trim_export.convert import staged, write_dense
from trim_export.converters.onnx import MODEL, Form, build, sparsify
from trim_export.progress import Track, silently
from trim_export.runtimes.onnxruntime import LACKING, ONNX_MANIFEST, operator_library
from trim_export.storage import canonical_json, read_json, sha256_file, write_bytes

__all__ = ["convert_to_onnx"]

_GENAI = "genai_config.json"
_DATA = f"{MODEL}.data"


def convert_to_onnx(
    artifact: Artifact,
    out: Path,
    form: Form | None,
    track: Track[Any] = silently,
    last_logits: bool = False,
    provider: str = "cpu",
) -> dict[str, Any]:
    """Write ``artifact`` as an ONNX model into a new directory.

    Args:
        artifact: a finished artifact.
        out: the directory to make; must not exist or be empty.
        form: of the sparse constants; None leaves the graph dense, zeros and all, for any runtime.
        track: shows progress of what goes before the export.
        last_logits: as `trim_export.converters.onnx.build`: for serving, not for `verify` and `eval`.
        provider: for which the graph is made, a name in `trim_export.converters.onnx.PROVIDERS`; it need not be here.

    Returns:
        What was written: target, directory, bytes before and after, how many matrices are sparse.

    Raises:
        UsageError, ModelError, EnvironmentLacks: as `trim_export.converters.onnx`.
    """
    with staged(out) as staging:
        dense, base = staging / ".dense", staging / ".base"
        dense.mkdir()
        write_dense(artifact, dense, None, track)
        exporter = build(dense, base, last_logits=last_logits, provider=provider)
        shutil.rmtree(dense)
        for file in sorted(base.iterdir()):
            if file.is_file() and (form is None or file.name not in (MODEL, _DATA)):
                shutil.move(file, staging / file.name)
        facts: dict[str, Any] = {"exporter": exporter, "form": "dense"}
        if form is not None:
            facts = {"exporter": exporter, "form": asdict(form)} | asdict(sparsify(base, staging, form))
            _add_library(staging, provider)
        shutil.rmtree(base)
        config = read_json(artifact.path / CONFIG)
        config.pop("quantization_config", None)
        write_bytes(staging / CONFIG, canonical_json(config))
        sizes = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
        facts |= {
            "format_version": 1,
            "tool_version": trim_export.__version__,
            "logits": "last" if last_logits else "all",
            "provider": provider,
            "source": artifact.manifest["source"],
            "sparsity": artifact.manifest["sparsity"],
            "files": {name: {"bytes": size, "sha256": sha256_file(staging / name)} for name, size in sizes.items()},
        }
        write_bytes(staging / ONNX_MANIFEST, canonical_json(facts))
    written = sum(size for name, size in sizes.items() if name.startswith(MODEL))
    before = artifact.manifest["bytes"]
    return {"target": "onnx", "directory": str(out), "bytes": written, "bytes_before": before["artifact"],
            "bytes_dense": before["dense"], "exporter": exporter, "matrices": facts.get("matrices", 0)}  # fmt: skip


def _add_library(folder: Path, provider: str) -> None:
    """Our operators for this machine, where onnxruntime-genai finds them: it takes none from outside of the model."""
    library = operator_library(provider)
    if library is None:
        warnings.warn(
            f"{LACKING[provider]}; without them in the directory its weights are decoded, and multiplied densely",
            RuntimeWarning,
            stacklevel=3,
        )
    if library is None or not (folder / _GENAI).is_file():
        return
    shutil.copyfile(library, folder / library.name)
    config = read_json(folder / _GENAI)
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = library.name
    write_bytes(folder / _GENAI, canonical_json(config))
