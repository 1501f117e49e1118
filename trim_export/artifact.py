"""The artifact: a directory that holds a sparse model, loads with `from_pretrained`, and knows what is in it.

    config.json, tokenizer files, README.md      what transformers and people read
    block-00000.safetensors ...                  one shard for each decoder block: the unit of resuming
    head.safetensors                             the LM head, if it was pruned
    rest.safetensors                             embeddings, norms, a dense head
    model.safetensors.index.json                 tensor -> shard
    trim_manifest.json                           written last: what was done, counts and hashes

While a run is under way there is `trim_journal.json` instead of a manifest: what was asked for and which shards are
finished. A directory without manifest is unfinished and is refused.

Torch is imported where a matrix is decoded, so that looking at an artifact does not wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from trim_export.errors import ArtifactError, choose
from trim_export.format import FORMAT_VERSION, METHOD, STORED
from trim_export.storage import difference, read_json, safe_file, tensor_names

if TYPE_CHECKING:
    from torch import Tensor

    from trim_export.converters import Encoding, SparseMatrix

__all__ = [
    "CONFIG",
    "FORMAT_VERSION",
    "HEAD",
    "INDEX",
    "JOURNAL",
    "MANIFEST",
    "REST",
    "Artifact",
    "block_shard",
    "open_artifact",
    "refuse_unfinished",
    "verify_files",
    "verify_hashes",
]

MANIFEST = "trim_manifest.json"
JOURNAL = "trim_journal.json"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
HEAD = "head.safetensors"
REST = "rest.safetensors"

# A dotted path of Python names; converters make files of it.
MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
QUALITY = ("target_sparsity", "cosine", "cosine_uniform")


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk.

    Attributes:
        path: the directory.
        manifest: the parsed `trim_manifest.json`, its required fields checked.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def encoding(self) -> Encoding:
        """How the pruned matrices are stored."""
        from trim_export.converters import ENCODINGS

        return choose("encoding", self.manifest["encoding"], ENCODINGS)

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """Pruned module name -> its entry (file, shape, nnz, row sparsities, quality)."""
        modules: dict[str, dict[str, Any]] = self.manifest["modules"]
        return modules

    def matrices(self) -> Iterator[tuple[str, SparseMatrix]]:
        """Every pruned matrix in order, decoded and checked against the manifest; one in memory at a time."""
        for name, entry in self.modules.items():
            yield name, self.matrix(name, entry)

    def matrix(self, name: str, entry: dict[str, Any]) -> SparseMatrix:
        """Decode one pruned matrix.

        Raises:
            ArtifactError: naming file, module and reason.
        """
        from trim_export.converters import require_finite

        file = safe_file(self.path, entry["file"])
        where = f"{file}: {name}"
        try:
            with safe_open(file, "pt") as shard:
                stored = set(shard.keys())
                tensors = {
                    suffix: shard.get_tensor(f"{name}.{suffix}")
                    for suffix in self.encoding.tensors
                    if f"{name}.{suffix}" in stored
                }
            matrix = self.encoding.decode(tensors, tuple(entry["shape"]))
            require_finite(matrix.values)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{where}: {error}") from error
        except ArtifactError as error:
            raise ArtifactError(f"{where}: {error}") from error
        if matrix.nnz != entry["nnz"]:
            raise ArtifactError(f"{where}: holds {matrix.nnz} weights, the manifest says {entry['nnz']}")
        return matrix

    def row_counts(self, name: str, entry: dict[str, Any]) -> NDArray[np.int64]:
        """Kept weights of each row of one pruned matrix, int64 ``[rows]``.

        Of a bit mask the bits are counted, which takes a tenth of the time of decoding and needs no torch.

        Raises:
            ArtifactError: naming file, module and reason.
        """
        if self.manifest["encoding"] != STORED:
            return self.matrix(name, entry).row_counts.numpy()
        file, (rows, columns) = safe_file(self.path, entry["file"]), entry["shape"]
        try:
            with safe_open(file, "np") as shard:
                mask = shard.get_tensor(f"{name}.weight_mask")
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: {name}: {error}") from error
        if mask.dtype != np.uint8 or mask.shape != (rows, -(-columns // 8)):
            raise ArtifactError(f"{file}: {name}: weight_mask is not the mask of {rows} x {columns} weights")
        counts: NDArray[np.int64] = np.bitwise_count(mask).sum(axis=1, dtype=np.int64)
        if counts.sum() != entry["nnz"]:
            raise ArtifactError(f"{file}: {name}: holds {counts.sum()} weights, the manifest says {entry['nnz']}")
        return counts

    def dense_tensors(self, file: str) -> dict[str, Tensor]:
        """The tensors of one shard that do not belong to a pruned matrix (norms, biases, embeddings)."""
        # "weight" for the guard, which whoever writes an artifact adds anew.
        suffixes = {*self.encoding.tensors, "weight"}
        encoded = {f"{name}.{suffix}" for name in self.modules for suffix in suffixes}
        path = safe_file(self.path, file)
        try:
            with safe_open(path, "pt") as shard:
                return {name: shard.get_tensor(name) for name in shard.keys() if name not in encoded}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path}: {error}") from error

    @property
    def shards(self) -> list[str]:
        """File names of the weight shards, in order."""
        return sorted(name for name in self.manifest["files"] if name.endswith(".safetensors"))


def open_artifact(path: Path | str) -> Artifact:
    """Open a finished artifact directory and check its manifest's form.

    Raises:
        ArtifactError: unfinished, not an artifact, or a manifest that cannot be right.
    """
    path = Path(path)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory")
    if not (path / MANIFEST).is_file():
        raise ArtifactError(_why_unfinished(path))
    manifest = read_json(safe_file(path, MANIFEST))
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{path / MANIFEST}: no format_version")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format {version} is newer than this trim-export reads ({FORMAT_VERSION}); upgrade trim-export"
        )
    _check_form(path / MANIFEST, manifest)
    return Artifact(path, manifest)


def refuse_unfinished(path: Path) -> None:
    """Refuse (`ArtifactError`) a directory that a run is still writing, or was when it was killed."""
    if (path / JOURNAL).exists() and not (path / MANIFEST).exists():
        raise ArtifactError(_why_unfinished(path))


def verify_files(artifact: Artifact) -> list[str]:
    """Compare every file with its recorded size and hash, then decode every matrix; returns what is wrong."""
    problems = verify_hashes(artifact)
    for name, entry in artifact.modules.items():
        try:
            artifact.matrix(name, entry)
        except ArtifactError as error:
            problems.append(str(error))
    return problems


def verify_hashes(artifact: Artifact) -> list[str]:
    """Compare every file with its recorded size and hash, and config.json with the manifest; returns what is wrong."""
    problems = [
        f"{artifact.path / MANIFEST}: does not list {name}, on which loading depends"
        for name in (CONFIG, INDEX)
        if name not in artifact.manifest["files"]
    ]
    for name, entry in artifact.manifest["files"].items():
        found = difference(artifact.path, name, entry["size"], entry["sha256"])
        problems += [found] if found else []
    for file in sorted(artifact.path.iterdir()):
        if file.suffix in (".safetensors", ".bin") and file.name not in artifact.manifest["files"]:
            problems.append(f"{file}: weights that the manifest does not list, which transformers may load instead")
    return problems or [*_stored_twice(artifact), *_contradictions(artifact)]


def _stored_twice(artifact: Artifact) -> list[str]:
    """Tensors of one name in several places, of which any reader may take another."""
    problems: list[str] = []
    places: dict[str, Path] = {}
    for shard in artifact.shards:
        file = artifact.path / shard
        try:
            with safe_open(file, "pt"):
                names = tensor_names(file)
        except (ArtifactError, SafetensorError, OSError) as error:
            problems.append(str(error) if isinstance(error, ArtifactError) else f"{file}: {error}")
            continue
        problems += [
            f"{file}: {name} is stored a second time; it is in {places[name]}" for name in names if name in places
        ]
        places |= dict.fromkeys(names, file)
    return problems


def _contradictions(artifact: Artifact) -> list[str]:
    """Where config.json, by which transformers loads, says other than the manifest; both may have the right hash."""
    file = artifact.path / CONFIG
    config = read_json(file)
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        return [f"{file}: does not describe a trim-export artifact"]
    expected = {
        "quant_method": METHOD,
        "format_version": artifact.manifest["format_version"],
        "encoding": artifact.manifest["encoding"],
    }
    problems = [
        f"{file}: {key} {settings.get(key)!r}, the manifest says {value!r}"
        for key, value in expected.items()
        if settings.get(key) != value
    ]
    listed = settings.get("modules")
    if not isinstance(listed, list) or sorted(map(str, listed)) != sorted(artifact.modules):
        problems.append(f"{file}: names other pruned modules than the manifest")
    return problems


def block_shard(index: int) -> str:
    """File name of a decoder block's shard."""
    return f"block-{index:05d}.safetensors"


def _why_unfinished(path: Path) -> str:
    if not (path / JOURNAL).is_file():
        return f"{path}: not a trim-export artifact (no {MANIFEST})"
    journal = read_json(path / JOURNAL)
    try:
        done, total = len(journal["shards"].keys() - {HEAD}), journal["blocks"]
    except (AttributeError, KeyError, TypeError):
        return f"{path / JOURNAL}: damaged; start anew with --overwrite"
    return f"{path}: unfinished, {done} of {total} blocks; run the same command with --resume"


def _check_form(file: Path, manifest: dict[str, Any]) -> None:
    """Fields and types that everything else relies on."""
    try:
        if manifest["encoding"] != STORED:
            _require_known(manifest["encoding"])
        sizes, sparsity = manifest["bytes"], manifest["sparsity"]
        numbers = sizes["artifact"], sizes["dense"], sparsity["target"], sparsity["achieved"]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("bytes or sparsity")
        if not all(isinstance(part, dict) for part in (manifest["run"]["recipe"], manifest["source"])):
            raise TypeError("run or source")
        for name, entry in manifest["files"].items():
            if not (isinstance(entry["size"], int) and isinstance(entry["sha256"], str)):
                raise TypeError(f"file {name}")
        for name, entry in manifest["modules"].items():
            rows, columns = entry["shape"]
            valid = all(type(number) is int and number > 0 for number in (rows, columns))
            if not (valid and type(entry["nnz"]) is int and 0 <= entry["nnz"] <= rows * columns):
                raise TypeError(f"module {name}")
            if not MODULE_NAME.fullmatch(name):
                raise TypeError(f"module {name!r}: not a name")
            if entry["file"] not in manifest["files"]:
                raise TypeError(f"module {name}: its file is not listed")
            rows_of = entry["row_sparsity"]
            quality = *(rows_of[key] for key in ("min", "median", "max")), *(entry[key] for key in QUALITY)
            if not all(isinstance(number, int | float) for number in quality):
                raise TypeError(f"module {name}: sparsities or cosines")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{file}: malformed ({type(error).__name__}: {error})") from error


def _require_known(encoding: Any) -> None:
    from trim_export.converters import ENCODINGS

    if encoding not in ENCODINGS:
        raise ValueError(f"unknown encoding {encoding!r}")
