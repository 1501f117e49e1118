"""The C++ kernels under address and undefined-behaviour sanitizers, fed with damaged matrices past our own checks.

Python never lets such a matrix through (`trim_export.converters`); here the kernels get it all the same, since the last
line must hold alone. ``TRIM_SANITIZED_CASES`` sets how many.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import torch
from attacks.sanitized import CASES, EXTREMES, damage, has_avx2, program, run

from trim_export.converters import SparseMatrix
from trim_export.converters.int8 import quantize_rows
from trim_export.runtimes.native import Preference, lay_out

ARRAYS = (
    "order",
    "mask",
    "group_start",
    "values",
    "slot_start",
    "slot_columns",
    "slot_values",
    "list_start",
    "list_columns",
    "list_values",
    "scales",
)
ELEMENTS = (4, 8, 8, 1, 8, 4, 1, 8, 2, 1, 4)
"""Bytes that an array is made of; those of values depend on the case."""
WIDTHS = (4, 8, 8, 8, 8, 4, 8, 8, 2, 8, 4)
"""Bytes that are damaged at a time."""
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@pytest.fixture(scope="module")
def corpus(sanitized_engine: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver with the engine in it."""
    driver = Path(__file__).parent / "corpus.cpp"
    return program(tmp_path_factory.mktemp("corpus"), driver, engine=sanitized_engine)


def sound_case(chance: random.Random) -> tuple[list[int], list[bytes]]:
    """Numbers and arrays of a matrix as the kernels get it from us."""
    rows, columns = chance.choice([(1, 1), (5, 63), (4, 64), (14, 150), (33, 200)])
    generator = torch.Generator().manual_seed(chance.getrandbits(30))
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < chance.choice([0.0, 0.1, 0.5, 1.0])
    kind = chance.randrange(len(TYPES))
    matrix, scales = SparseMatrix(mask, weight[mask].to(TYPES[kind] if kind < 3 else torch.float32)), None
    if kind == 3:
        matrix, scales = quantize_rows(matrix)
    laid = lay_out(matrix, scales, Preference(chance.choice([0.0, 0.15, 1.0]), chance.choice([0.0, 4.0, 1e9])))
    arrays = [_bytes(getattr(laid, name)) for name in ARRAYS]
    numbers = [rows, columns, min(4 * len(laid.mask), rows), kind, chance.choice([1, 2, 5, 40])]
    return [*numbers, chance.choice([1, 2, 3])], arrays


def _bytes(tensor: torch.Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def damaged(chance: random.Random, numbers: list[int], arrays: list[bytes]) -> None:
    """One change, of a number or of an array."""
    if chance.random() < 0.15:
        place = chance.choice([0, 1, 2, 3, 5])
        numbers[place] = chance.choice([*EXTREMES, numbers[place] + 1, numbers[place] - 1])
        return
    place = chance.choice([0, 1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 7, 8, 8, 9, 10])
    arrays[place] = damage(chance, arrays[place], WIDTHS[place])


def written(number: list[int], arrays: list[bytes]) -> bytes:
    whole = [data + bytes(-len(data) % size) for data, size in zip(arrays, ELEMENTS, strict=True)]
    return struct.pack("<17q", *number, *map(len, whole)) + b"".join(whole)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_kernels_touch_nothing_that_is_not_theirs(isa: str, corpus: Path, tmp_path: Path) -> None:
    if isa == "avx2" and not has_avx2():
        pytest.skip("needs AVX2")
    chance = random.Random(isa)
    cases = tmp_path / "cases"
    with cases.open("wb") as file:
        for _ in range(CASES):
            numbers, arrays = sound_case(chance)
            for _ in range(chance.randint(1, 3)):
                damaged(chance, numbers, arrays)
            file.write(written(numbers, arrays))
    taken, refused = (int(word.split()[0]) for word in run([str(corpus), str(cases), isa]).split(","))
    assert taken + refused == CASES
    # Damage to values or to a row order is none to the structure; the rest is refused.
    assert taken > CASES // 20
    assert refused > CASES // 2


def test_what_is_sound_is_taken(corpus: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    (tmp_path / "cases").write_bytes(b"".join(written(*sound_case(chance)) for _ in range(100)))
    assert run([str(corpus), str(tmp_path / "cases"), "portable"]) == "100 taken, 0 refused\n"
