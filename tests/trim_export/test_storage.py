"""Files are whole or as before; names from a manifest stay in their directory; JSON has one form."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from trim_export import storage
from trim_export.errors import ArtifactError
from trim_export.storage import (
    canonical_json,
    read_json,
    safe_file,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_tensors,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
WRITERS = pytest.mark.parametrize(
    "write",
    [lambda path: write_bytes(path, b"new"), lambda path: write_tensors(path, TENSORS)],
    ids=["bytes", "tensors"],
)
Write = Callable[[Path], None]

# ---- atomic writes ---------------------------------------------------------------------------------------------------


@WRITERS
def test_a_write_leaves_one_file_that_all_may_read(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_bytes_come_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a much longer old content")
    write_bytes(tmp_path / "file", b"\0new\n")
    assert (tmp_path / "file").read_bytes() == b"\0new\n"


def test_tensors_come_back_whatever_their_layout(tmp_path: Path) -> None:
    tensors = TENSORS | {"transposed": torch.arange(6.0).view(2, 3).T, "parameter": torch.nn.Parameter(torch.ones(2))}
    write_tensors(tmp_path / "file", tensors)
    stored = safetensors.torch.load_file(tmp_path / "file")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one", TENSORS)
    write_tensors(tmp_path / "other", dict(reversed(TENSORS.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


class Stopped(BaseException):
    """Not an `Exception`, like a KeyboardInterrupt."""


def fail(*args: object, **kwargs: object) -> None:
    raise Stopped


def write_half(tensors: object, path: Path, **kwargs: object) -> None:
    Path(path).write_bytes(b"half of")
    raise OSError("no space left on device")


@WRITERS
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, step: str, old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(*{"fsync": (os, "fsync", fail), "replace": (Path, "replace", fail)}[step])
        with pytest.raises(Stopped):
            write(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({} if old is None else {"file": old})


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(safetensors.torch, "save_file", write_half)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(tmp_path / "file", TENSORS)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}


@WRITERS
def test_contents_are_on_the_disk_before_the_name_points_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    events: list[str] = []
    replace = Path.replace

    def synced(path: Path) -> None:
        events.append(f"sync {path.name}")

    def replaced(path: Path, target: Path) -> Path:
        events.append("replace")
        return replace(path, target)

    monkeypatch.setattr(storage, "_sync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write(tmp_path / "file")
    assert len(events) == 3
    assert events[0] not in ("sync file", f"sync {tmp_path.name}")  # the temporary
    assert events[1:] == ["replace", f"sync {tmp_path.name}"]


def test_a_left_over_temporary_is_in_nobodys_way(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"1")
    (tmp_path / ".file.tmp").write_bytes(b"of a killed run")
    write_bytes(tmp_path / "file", b"2")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"2"}


def test_writing_where_there_is_no_directory_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "missing" / "file", b"")


# ---- names from a manifest -------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with one good file and everything that is none."""
    (tmp_path / "outside").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "directory").mkdir(parents=True)
    (root / "directory" / "file").write_bytes(b"")
    (root / ".hidden").write_bytes(b"")
    (root / "block-00000.safetensors").write_bytes(b"x")
    (root / "link").symlink_to("block-00000.safetensors")
    (root / "link-out").symlink_to("../outside")
    (root / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    return root


def test_a_plain_file_is_found(root: Path) -> None:
    assert safe_file(root, "block-00000.safetensors") == root / "block-00000.safetensors"


def test_the_directory_itself_may_be_reached_by_a_link(root: Path) -> None:
    link = root.parent / "alias"
    link.symlink_to(root)
    assert safe_file(link, "block-00000.safetensors").read_bytes() == b"x"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../outside",
        "directory/file",
        "directory/../block-00000.safetensors",
        "./block-00000.safetensors",
        "block-00000.safetensors/",
        "/etc/passwd",
        ".hidden",
        "a\\b",
        "C:file",
        "-rf",
        "block-00000.safetensors\n",
        "block-00000.safetensors\0",
        "with space",
        "$HOME",
        "ünicode",
        "x" * 129,
    ],
)
def test_a_name_that_is_no_plain_component_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="unsafe file name"):
        safe_file(root, name)


@pytest.mark.parametrize("name", ["link", "link-out", "dangling", "fifo", "directory"])
def test_what_is_not_a_regular_file_is_refused_without_opening_it(root: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=f"{name}: not a regular file"):
        safe_file(root, name)


def test_a_missing_file_is_named(root: Path) -> None:
    with pytest.raises(ArtifactError, match=r"rest\.safetensors: missing"):
        safe_file(root, "rest.safetensors")


# ---- JSON and hashes -------------------------------------------------------------------------------------------------


def test_canonical_json_is_one_text_for_one_value() -> None:
    expected = '{\n  "a": {\n    "b": [\n      1,\n      2.5\n    ],\n    "ä": null\n  },\n  "z": true\n}\n'
    assert canonical_json({"z": True, "a": {"ä": None, "b": [1, 2.5]}}) == expected.encode()
    assert canonical_json({"a": {"b": [1, 2.5], "ä": None}, "z": True}) == expected.encode()


@pytest.mark.parametrize("number", [0.1, 1e-300, 2**70, -0.0, 0.30000000000000004])
def test_canonical_json_keeps_numbers(number: float) -> None:
    assert repr(json.loads(canonical_json([number]))[0]) == repr(number)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_canonical_json_refuses_what_json_has_no_number_for(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"deep": [number]})


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, {"b": "ä"}], "c": None}
    (tmp_path / "file").write_bytes(canonical_json(value))
    assert read_json(tmp_path / "file") == value


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a": 1', b"\xff\xfe\xfa", b"[" * 100_000, b"1" * 10_000, b"{} {}"],
    ids=["empty", "open", "cut", "not-text", "deep", "huge-number", "two-values"],
)
def test_damaged_json_is_an_artifact_error_that_names_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"manifest\.json: not readable as JSON"):
        read_json(tmp_path / "manifest.json")


def test_missing_json_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json: not readable"):
        read_json(tmp_path / "manifest.json")


@pytest.mark.parametrize("data", [b"", b"abc", bytes(3_000_001)], ids=["empty", "short", "long"])
def test_hashes_are_sha256(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
