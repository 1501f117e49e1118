"""The header of a GGUF file, read with suspicion before a library maps the file and believes it.

A GGUF file is: magic, version, number of tensors, number of key-value pairs; the pairs; name, dimensions, type and
offset of each tensor; and, aligned, the tensors' bytes (specification: ggml's docs/gguf.md). Readers that trust the
numbers in it loop or allocate for as long as a hostile file says. Here every number is bounded by the bytes that the
file really has.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from trim_export.errors import ModelError

__all__ = ["check_gguf"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
MOST_ITEMS = 2**22
"""Tensors, keys and elements of arrays in one file; the largest vocabularies have less than a fifth of that."""

# Bytes of each type of value; a string (8) and an array (9) say their own length.
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
UNSIGNED = {0: "<B", 2: "<H", 4: "<I", 10: "<Q"}
STRING, ARRAY = 8, 9


def check_gguf(path: Path, layouts: Mapping[int, tuple[int, int]]) -> None:
    """Refuse a GGUF file whose header does not describe the bytes that follow it.

    Args:
        path: the file.
        layouts: tensor type -> weights and bytes of one of its blocks (`gguf.GGML_QUANT_SIZES`).

    Raises:
        ModelError: naming file, tensor or key, and reason.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            _check(_Reader(file, size), size, layouts)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error


class _Reader:
    """Little-endian numbers and strings, none of which may reach beyond the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.left = size
        self._items = MOST_ITEMS

    def expect(self, count: int, least: int, what: str) -> None:
        """Refuse so many items of at least so many bytes before anyone loops over them."""
        self._items -= count
        if self._items < 0 or count * least > self.left:
            raise ModelError(f"{count} {what} cannot be in the {self.left} bytes left, or are more than any model has")

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise ModelError(f"{what} needs {count} bytes, the file has {self.left} left")
        self.left -= count
        return self._file.read(count)

    def skip(self, count: int, what: str) -> None:
        if count > self.left:
            raise ModelError(f"{what} needs {count} bytes, the file has {self.left} left")
        self.left -= count
        self._file.seek(count, 1)

    def number(self, form: str, what: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def text(self, what: str) -> str:
        data = self.take(self.number("<Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{what} is not UTF-8") from error


def _check(reader: _Reader, size: int, layouts: Mapping[int, tuple[int, int]]) -> None:
    if reader.take(4, "the magic number") != MAGIC:
        raise ModelError("not a GGUF file")
    version = reader.number("<I", "the version")
    if version not in VERSIONS:
        raise ModelError(f"GGUF version {version}; this reads {' and '.join(map(str, VERSIONS))}")
    tensors = reader.number("<Q", "the number of tensors")
    pairs = reader.number("<Q", "the number of keys")
    reader.expect(tensors, 32, "tensors")  # lengths of name and dimensions, one dimension, type and offset
    reader.expect(pairs, 13, "keys")  # length, type and a byte
    numbers = _check_pairs(reader, pairs)
    for key, value in numbers.items():
        if key.endswith(".block_count") and value > tensors:
            raise ModelError(f"{key}: {value} decoder blocks cannot be made of {tensors} tensors")
    alignment = numbers.get("general.alignment", 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise ModelError(f"general.alignment {alignment} is not a power of two")
    _check_tensors(reader, tensors, size, alignment, layouts)


def _check_pairs(reader: _Reader, count: int) -> dict[str, int]:
    """Walk over the pairs; the values of those that are unsigned numbers."""
    seen: set[str] = set()
    numbers: dict[str, int] = {}
    for index in range(count):
        key = reader.text(f"key {index}")
        if key in seen:
            raise ModelError(f"the key {key!r} occurs twice")
        seen.add(key)
        kind = reader.number("<I", key)
        if kind in UNSIGNED:
            numbers[key] = reader.number(UNSIGNED[kind], key)
        else:
            _skip_value(reader, kind, key)
    return numbers


def _skip_value(reader: _Reader, kind: int, key: str) -> None:
    if kind == STRING:
        reader.skip(reader.number("<Q", key), key)
    elif kind == ARRAY:
        kind, length = reader.number("<I", key), reader.number("<Q", key)
        reader.expect(length, 1, f"elements of {key}")
        if kind == STRING:
            for _ in range(length):
                reader.skip(reader.number("<Q", key), key)
        elif kind in SCALARS:
            reader.skip(SCALARS[kind] * length, key)
        else:
            raise ModelError(f"{key}: an array of type {kind}")
    elif kind in SCALARS:
        reader.skip(SCALARS[kind], key)
    else:
        raise ModelError(f"{key}: unknown type {kind}")


def _check_tensors(
    reader: _Reader, count: int, size: int, alignment: int, layouts: Mapping[int, tuple[int, int]]
) -> None:
    spans: dict[str, tuple[int, int]] = {}
    for index in range(count):
        name = reader.text(f"tensor {index}")
        if name in spans:
            raise ModelError(f"the tensor {name!r} occurs twice")
        rank = reader.number("<I", name)
        if not 1 <= rank <= MOST_DIMENSIONS:
            raise ModelError(f"{name}: {rank} dimensions")
        sides = [reader.number("<Q", name) for _ in range(rank)]
        kind, offset = reader.number("<I", name), reader.number("<Q", name)
        if kind not in layouts:
            raise ModelError(f"{name}: unknown type {kind}")
        weights, block = layouts[kind]
        if min(sides) < 1 or sides[0] % weights:
            raise ModelError(f"{name}: {sides} weights are not whole blocks of {weights}")
        if offset % alignment:
            raise ModelError(f"{name}: starts at {offset}, which is not a multiple of {alignment}")
        spans[name] = (offset, offset + math.prod(sides) // weights * block)
    begin = -(-(size - reader.left) // alignment) * alignment
    previous = 0
    for name, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        if first < previous:
            raise ModelError(f"{name}: overlaps the tensor before it")
        if begin + last > size:
            raise ModelError(f"{name}: ends at byte {begin + last} of {size}")
        previous = last
