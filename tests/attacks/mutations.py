"""Random damage to an artifact's files, drawn by Hypothesis: to bytes, to headers and JSON, to the files as such."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

__all__ = ["MUTATIONS", "SEED", "Mutation", "mutate", "mutations"]

MUTATIONS = int(os.environ.get("TRIM_FUZZ_MUTATIONS", "500"))
SEED = int(os.environ.get("TRIM_FUZZ_SEED", "0"))

Mutation = tuple[str, str, tuple[Any, ...]]
"""File, kind and parameters, so that a failing example says what was done."""

NUMBERS = [-(2**63), -(2**31) - 1, -1, 0, 1, 2, 7, 8, 2**15, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, 1e308]
VALUES: list[Any] = [
    *NUMBERS,
    None,
    True,
    "",
    "..",
    "../config.json",
    "/etc/passwd",
    "x" * 300,
    "\0",
    [],
    {},
    [[]],
    "csr",
]


def _edited(content: Any, path: list[int], value: Any, how: str) -> Any:
    """Walk down by choosing the path[i]-th child at each level, and change what is there."""
    if not path or not isinstance(content, dict | list) or not content:
        return value
    keys: list[Any] = sorted(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[path[0] % len(keys)]
    child = content[key]
    if len(path) == 1 or not isinstance(child, dict | list) or not child:
        if how == "drop":
            del content[key]
        elif how == "rename" and isinstance(content, dict):
            content[str(value)] = content.pop(key)
        elif how == "copy" and isinstance(content, dict):
            content[str(value)] = child
        else:
            content[key] = value
    else:
        content[key] = _edited(child, path[1:], value, how)
    return content


def _json(data: bytes, path: list[int], value: Any, how: str) -> bytes:
    return json.dumps(_edited(json.loads(data), path, value, how)).encode()


def _header(data: bytes, path: list[int], value: Any, how: str) -> bytes:
    size = int.from_bytes(data[:8], "little")
    text = _json(data[8 : 8 + size], path, value, how)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _at(data: bytes, place: float) -> int:
    return min(int(place * len(data)), max(len(data) - 1, 0))


def _flip(data: bytes, place: float, bit: int) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[_at(data, place)] ^= 1 << bit
    return bytes(changed)


def _overwrite(data: bytes, place: float, put: bytes) -> bytes:
    begin = _at(data, place)
    return data[:begin] + put + data[begin + len(put) :]


def _insert(data: bytes, place: float, put: bytes) -> bytes:
    return data[: _at(data, place)] + put + data[_at(data, place) :]


def _cut(data: bytes, place: float, length: int) -> bytes:
    return data[: _at(data, place)] + data[_at(data, place) + length :]


def _truncate(data: bytes, place: float) -> bytes:
    return data[: _at(data, place)]


CHANGES: dict[str, Callable[..., bytes]] = {
    "flip": _flip,
    "overwrite": _overwrite,
    "insert": _insert,
    "cut": _cut,
    "truncate": _truncate,
    "json": _json,
    "header": _header,
}


def mutate(directory: Path, mutation: Mutation) -> None:
    """Do it; what an earlier mutation made impossible is left out. Files are replaced, never written into."""
    name, kind, parameters = mutation
    file = directory / name
    if kind in CHANGES:
        if not file.is_file() or file.is_symlink():
            return
        try:
            data = CHANGES[kind](file.read_bytes(), *parameters)
        except (ValueError, RecursionError):
            return  # no JSON any more
        file.unlink()
        file.write_bytes(data)
        return
    if not os.path.lexists(file) or file.is_dir():
        return
    if kind == "swap":
        other = directory / parameters[0]
        if other.is_file() and other != file:
            aside = file.rename(directory / ".aside")
            other.rename(file)
            aside.rename(other)
        return
    file.unlink()
    if kind == "link":
        file.symlink_to(parameters[0])
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        assert kind == "remove"


def mutations(names: list[str], weights: tuple[str, ...] = (".safetensors",)) -> st.SearchStrategy[list[Mutation]]:
    """One to three mutations of files with these names; weights and what is read before them most often."""
    file = st.sampled_from(names)
    shard = st.sampled_from([name for name in names if name.endswith(weights)])
    text = st.sampled_from([name for name in names if name.endswith(".json")])
    place = st.one_of(st.floats(0, 1), st.floats(0, 0.2))
    put = st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f"]))
    edit = st.tuples(
        st.lists(st.integers(0, 40), min_size=1, max_size=5),
        st.one_of(st.sampled_from(VALUES), st.integers(-(2**40), 2**40)),
        st.sampled_from(["put", "put", "put", "drop", "rename", "copy"]),
    )
    one = st.one_of(
        st.tuples(shard, st.just("flip"), st.tuples(place, st.integers(0, 7))),
        st.tuples(shard, st.just("overwrite"), st.tuples(place, put)),
        st.tuples(shard, st.just("header"), edit),
        st.tuples(text, st.just("json"), edit),
        st.tuples(file, st.just("flip"), st.tuples(place, st.integers(0, 7))),
        st.tuples(file, st.just("insert"), st.tuples(place, put)),
        st.tuples(file, st.just("cut"), st.tuples(place, st.integers(1, 64))),
        st.tuples(file, st.just("truncate"), st.tuples(place)),
        st.tuples(file, st.just("swap"), st.tuples(file)),
        st.tuples(
            file, st.just("link"), st.tuples(st.sampled_from(["../x", "/dev/zero", "config.json", "/etc/passwd"]))
        ),
        st.tuples(file, st.sampled_from(["pipe", "directory", "remove"]), st.just(())),
    )
    return st.lists(one, min_size=1, max_size=3)
