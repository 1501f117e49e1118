"""Files that are either whole or absent: atomic writes, hashes, and names that cannot leave their directory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from trim_export.errors import ArtifactError

__all__ = [
    "canonical_json",
    "read_json",
    "safe_file",
    "sha256_bytes",
    "sha256_file",
    "temporary_file",
    "write_bytes",
    "write_tensors",
]

# One path component: no separator, no leading dot, nothing a shell or another system reads as special.
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def canonical_json(value: Any) -> bytes:
    """The one serialisation of ``value``: sorted keys, two spaces, a final newline, no NaN."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Parse a JSON file; damage is an `ArtifactError` that names it."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from error


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in one pass of bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, and have it on the disk before returning."""
    _write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; tensors may live on any device."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_atomically(path, lambda temporary: safetensors.torch.save_file(whole, temporary, metadata={"format": "pt"}))


def temporary_file(path: Path) -> Path:
    """Where a file is written before it gets its name; what a killed process leaves there is overwritten."""
    return path.with_name(f".{path.name}.tmp")


def safe_file(root: Path, name: str) -> Path:
    """Resolve a name found in a manifest; anything but a plain file directly inside ``root`` is refused."""
    if not isinstance(name, str) or not SAFE_NAME.fullmatch(name):
        raise ArtifactError(f"{root}: unsafe file name {name!r}")
    path = root / name
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise ArtifactError(f"{path}: missing") from error
    if not stat.S_ISREG(mode):
        raise ArtifactError(f"{path}: not a regular file")
    return path


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    temporary = temporary_file(path)
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors makes its files private
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
