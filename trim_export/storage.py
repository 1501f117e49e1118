"""Files that are either whole or absent: atomic writes, hashes, and names that cannot leave their directory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from trim_export.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SAFE_NAME",
    "canonical_json",
    "difference",
    "read_json",
    "refuse_special_files",
    "safe_file",
    "sha256_bytes",
    "sha256_file",
    "temporary_file",
    "tensor_names",
    "write_bytes",
    "write_tensors",
]

# One path component: no separator, no leading dot, nothing a shell or another system reads as special.
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

MOST_JSON_BYTES = 2**28
"""A larger JSON file is no configuration, index or manifest of a model (one of 400 B parameters has 1 MB)."""


def canonical_json(value: Any) -> bytes:
    """The one serialisation of ``value``: sorted keys, two spaces, a final newline, no NaN."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Parse a JSON file; damage, a key that occurs twice, or an absurd size is an `ArtifactError` that names it."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"larger than {MOST_JSON_BYTES} bytes")
        return json.loads(path.read_bytes(), object_pairs_hook=_object)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from error


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in one pass of bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(root: Path, name: str, size: int, sha256: str) -> str | None:
    """What tells a file inside ``root`` from the one that a manifest recorded, as a sentence; None if nothing does."""
    try:
        file = safe_file(root, name)
    except ArtifactError as error:
        return str(error)
    found = file.stat().st_size
    if found != size:
        return f"{file}: {found} bytes, the manifest says {size}"
    if sha256_file(file) != sha256:
        return f"{file}: its contents are not those the manifest recorded (sha256 differs)"
    return None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, and have it on the disk before returning."""
    _write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; tensors may live on any device."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(whole, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            if "No space left" in str(error):  # the one error of the system that its users can do something about
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise

    _write_atomically(path, write)


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file, from its header alone; its library checks the rest of it.

    Raises:
        ArtifactError: no header, or a name occurs twice, of which the library would read the last.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError(f"{size} bytes of it in a file of {path.stat().st_size}")
            header = json.loads(file.read(size), object_pairs_hook=_object)
        if not isinstance(header, dict):
            raise TypeError("no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its header is not sound ({error})") from error
    return [name for name in header if name != "__metadata__"]


def temporary_file(path: Path) -> Path:
    """Where a file is written before it gets its name; what a killed process leaves there is overwritten."""
    return path.with_name(f".{path.name}.tmp")


def safe_file(root: Path, name: str) -> Path:
    """Resolve a name found in a manifest; anything but a plain file directly inside ``root`` is refused.

    The hub's cache is the one exception: there a file of a snapshot is a link into the ``blobs`` beside the snapshots.
    """
    if not isinstance(name, str) or not SAFE_NAME.fullmatch(name):
        raise ArtifactError(f"{root}: unsafe file name {name!r}")
    path = root / name
    try:
        target = _behind_cache_link(path)
        regular = stat.S_ISREG(target.lstat().st_mode)
    except OSError as error:
        raise ArtifactError(f"{path}: missing") from error
    if not regular:
        raise ArtifactError(f"{path}: not a regular file")
    return path


def refuse_special_files(root: Path) -> None:
    """Refuse (`ArtifactError`) a directory with links, pipes or devices in it: to open one may hang or lead elsewhere.

    Directories are passed over, since nothing of ours reads them.
    """
    for path in sorted(root.iterdir()):
        mode = _behind_cache_link(path).lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ArtifactError(f"{path}: not a regular file")


def _behind_cache_link(path: Path) -> Path:
    """What a link of the hub's cache (snapshots/REVISION/FILE) leads to in its blobs; any other path as it is."""
    if not path.is_symlink():
        return path
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # dangling, or a loop
        return path
    snapshot = path.parent.resolve()
    in_cache = snapshot.parent.name == "snapshots" and target.parent == snapshot.parent.parent / "blobs"
    return target if in_cache else path


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object each of whose keys occurs once: of two, readers disagree which counts."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return result


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
