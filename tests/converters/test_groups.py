"""The encodings for GPUs: slot by slot against a loop over their definitions, their sizes, and hostile ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_same, dense64
from torch import Tensor

from trim_export.converters import G8, InterleavedCsr, SparseMatrix, nbytes
from trim_export.converters._groups import check_limits
from trim_export.converters.csr_interleaved import cost
from trim_export.errors import ArtifactError, UsageError


def random_matrix(
    rows: int, columns: int, density: float, seed: int = 0, dtype: torch.dtype = torch.float32
) -> SparseMatrix:
    """Rows of very different densities around ``density``, about one kept weight in eight exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density * 2 * torch.rand(rows, 1, generator=generator)
    values = torch.randn(int(mask.sum()), generator=generator)
    return SparseMatrix(mask, (values * (torch.rand(values.shape, generator=generator) < 0.875)).to(dtype))


SHAPES = st.tuples(st.sampled_from([1, 2, 5, 9]), st.sampled_from([1, 7, 8, 15, 16, 17, 130, 300, 700]))
DENSITIES = st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5, 1.0])


def g8_slots(stored: dict[str, Tensor], row: int) -> list[tuple[int, float]]:
    """Column and value of each slot of a row, as a kernel sees them."""
    slots = []
    ptr, values = stored["weight_group_ptr"].tolist(), stored["weight_values"].tolist()
    for group in range(ptr[row], ptr[row + 1]):
        column = stored["weight_base"][group].item() & 0xFFFF
        for slot in range(8):
            column += stored["weight_gaps"][group].item() >> 4 * slot & 15
            slots.append((column, values[8 * group + slot]))
    return slots


def interleaved_slots(stored: dict[str, Tensor], row: int) -> list[tuple[int, float]]:
    """The same for interleaved rows, in the order of their weights."""
    slots = []
    begin, end = (8 * stored["weight_group_ptr"][row + i].item() for i in (0, 1))
    for chunk in range(begin, end, 256):
        lanes = (min(end, chunk + 256) - chunk) // 8
        for u in range(8):
            for lane in range(lanes):
                at = chunk + 8 * lane + u
                slots.append((stored["weight_columns"][at].item() & 0xFFFF, stored["weight_values"][at].item()))
    return slots


@settings(max_examples=50)
@given(shape=SHAPES, density=DENSITIES, seed=st.integers(0, 2**20))
@pytest.mark.parametrize(("encoding", "slots"), [(G8(), g8_slots), (InterleavedCsr(), interleaved_slots)])
def test_adding_up_all_slots_gives_the_matrix(encoding, slots, shape, density, seed) -> None:  # type: ignore[no-untyped-def]
    matrix = random_matrix(*shape, density, seed)
    stored = encoding.encode(matrix)
    dense = np.zeros(shape)
    for row in range(shape[0]):
        columns = [column for column, _ in slots(stored, row)]
        assert columns == sorted(columns)
        for column, value in slots(stored, row):
            dense[row, column] += value
    np.testing.assert_array_equal(dense, dense64(matrix))
    assert_same(encoding.decode(stored, shape), matrix)


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("gap", [1, 14, 15, 16, 29, 30, 31, 45, 105, 106, 120])
def test_kept_zeros_are_no_bridges(gap: int, zero: float) -> None:
    mask = torch.zeros(2, 400, dtype=torch.bool)
    mask[:, [3, 3 + gap, 3 + 2 * gap]] = True
    matrix = SparseMatrix(mask, torch.tensor([zero, zero, 1.0, 2.0, zero, zero]))
    assert_same(G8().decode(G8().encode(matrix), matrix.shape), matrix)


def test_a_group_reaches_as_far_as_it_can() -> None:
    def bases(columns: list[int]) -> list[int]:
        mask = torch.zeros(1, 1000, dtype=torch.bool)
        mask[0, columns] = True
        stored: list[int] = G8().encode(SparseMatrix(mask, torch.ones(len(columns))))["weight_base"].tolist()
        return stored

    assert bases(list(range(16))) == [0, 8]
    assert bases([0, 105]) == [0]  # six bridges of 15, and 15 more
    assert bases([0, 106]) == [0, 106]
    assert bases([0, 1, 2, 3, 4, 5, 21, 22]) == [0, 22]  # the bridge to 21 takes the seventh slot
    assert bases([0, 1, 2, 3, 4, 5, 6, 22, 23]) == [0, 22]  # no room for a bridge


def test_the_widest_matrix() -> None:
    mask = torch.zeros(1, 2**16, dtype=torch.bool)
    mask[0, [0, 2**15 - 1, 2**15, 2**16 - 1]] = True
    matrix = SparseMatrix(mask, torch.arange(1.0, 5.0))
    for encoding in (G8(), InterleavedCsr()):
        assert_same(encoding.decode(encoding.encode(matrix), matrix.shape), matrix)


@pytest.mark.parametrize("encoding", [G8(), InterleavedCsr()])
def test_a_wider_one_is_refused_with_what_to_use_instead(encoding: G8 | InterleavedCsr) -> None:
    mask = torch.zeros(1, 2**16 + 1, dtype=torch.bool)
    with pytest.raises(UsageError, match=r"^65537 columns do not fit the 16-bit indices .* use CSR \(torch-sparse\)$"):
        encoding.encode(SparseMatrix(mask, torch.empty(0)))


def test_offsets_beyond_32_bits_are_refused() -> None:
    check_limits(2**16, 2**31 - 8)
    with pytest.raises(UsageError, match=r"^2147483648 slots do not fit .* use CSR \(torch-sparse\)$"):
        check_limits(2**16, 2**31)


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 1.40), (0.7, 0.85), (0.8, 0.58), (0.9, 0.36)])
def test_bytes_of_a_weight(sparsity: float, most: float) -> None:
    mask = torch.rand(256, 4096, generator=torch.Generator().manual_seed(0)) >= sparsity
    matrix = SparseMatrix(mask, torch.ones(int(mask.sum()), dtype=torch.bfloat16))
    assert nbytes(G8().encode(matrix)) / mask.numel() <= most


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_the_cost_of_interleaving_is_known_before(density: float) -> None:
    matrix = random_matrix(9, 301, density, dtype=torch.float16)
    assert cost(matrix) == nbytes(InterleavedCsr().encode(matrix))


SHAPE = (3, 100)
MASK = torch.zeros(SHAPE, dtype=torch.bool)
MASK[0, ::10] = True
MASK[2, [0, 40, 99]] = True
MATRIX = SparseMatrix(MASK, torch.arange(1.0, 14.0))
STORED = {encoding.name: encoding.encode(MATRIX) for encoding in (G8(), InterleavedCsr())}


def changed(encoding: G8 | InterleavedCsr, name: str, index: int, value: float) -> dict[str, Tensor]:
    stored = STORED[encoding.name]
    tensor = stored[name].clone()
    tensor[index] = value
    return stored | {name: tensor}


@pytest.mark.parametrize(
    ("encoding", "name", "index", "value", "reason"),
    [
        (G8(), "weight_group_ptr", 0, 1, "does not rise from 0"),
        (G8(), "weight_group_ptr", 1, 99, "does not rise from 0"),
        (G8(), "weight_group_ptr", 3, 1, "does not rise from 0"),
        (G8(), "weight_group_ptr", 3, 2**31 - 1, "does not rise from 0"),
        (G8(), "weight_base", 0, 99, r"column outside 0\.\.99"),
        (G8(), "weight_base", 0, -1, r"column outside 0\.\.99"),
        (G8(), "weight_base", 1, 70, "not strictly increasing in row 0"),
        (G8(), "weight_gaps", 0, 1, "does not begin at its base column"),
        (G8(), "weight_gaps", 0, -16, r"column outside 0\.\.99"),
        (G8(), "weight_gaps", 1, 0, "not zero in a slot that holds no weight"),
        (G8(), "weight_values", 15, 1.0, "not zero in a slot that holds no weight"),
        (G8(), "weight_values", 15, -0.0, "not zero in a slot that holds no weight"),
        (InterleavedCsr(), "weight_group_ptr", 2, 1, "does not rise from 0"),
        (InterleavedCsr(), "weight_columns", 0, 100, r"column outside 0\.\.99"),
        (InterleavedCsr(), "weight_columns", 2, 95, "not strictly increasing in row 0"),
        (InterleavedCsr(), "weight_columns", 2, 30, "not zero in a slot that holds no weight"),
        (InterleavedCsr(), "weight_values", 15, 1.0, "not zero in a slot that holds no weight"),
    ],
)
def test_what_a_hostile_file_may_not_do(
    encoding: G8 | InterleavedCsr, name: str, index: int, value: float, reason: str
) -> None:
    with pytest.raises(ArtifactError, match=reason):
        encoding.decode(changed(encoding, name, index, value), SHAPE)


@pytest.mark.parametrize("encoding", [G8(), InterleavedCsr()])
def test_values_come_in_groups(encoding: G8 | InterleavedCsr) -> None:
    stored = STORED[encoding.name]
    with pytest.raises(ArtifactError, match="weight_values has 23 slots, which are not groups of 8"):
        encoding.decode(stored | {"weight_values": stored["weight_values"][:23]}, SHAPE)
