"""Operators: what functions and kernels compute of stored constants, against float64."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphs import constants, needs_operators, product, write_operator

from trim_export.converters import SparseMatrix
from trim_export.converters.onnx.operators import DENSE, SPARSE, VALUES, Operator, pick_encoding, with_values
from trim_export.errors import UsageError

OPERATORS = {**SPARSE, "dense": DENSE}
shapes = st.tuples(st.integers(1, 41), st.sampled_from([1, 3, 8, 63, 64, 65, 130]))


def random_matrix(shape: tuple[int, int], seed: int) -> SparseMatrix:
    """Rows from empty to full."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(shape[0], 1, generator=generator) * 1.5 - 0.25
    mask = torch.rand(shape, generator=generator) < share
    return SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator))


def check(operator: Operator, shape: tuple[int, int], values: str, tokens: int, seed: int, kernels: bool) -> None:
    matrix = random_matrix(shape, seed)
    inputs = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(seed))
    stored, scales = with_values(matrix, values)
    weight = stored.to_dense().double() * scales.double()[:, None]
    with tempfile.TemporaryDirectory() as name:
        write_operator(Path(name), operator, shape, constants(operator, matrix, values))
        given = product(Path(name), inputs, kernels).double()
    exact = inputs.double() @ weight.T
    assert given.shape == exact.shape
    bound = 1e-5 * (inputs.double().abs() @ weight.abs().T) + 1e-30
    if kernels and values == "int8":  # inputs are rounded to a thousand integers at least, by half a step at most
        bound += inputs.double().abs().amax(dim=1, keepdim=True) / 1000 * weight.abs().sum(dim=1)
    assert ((given - exact).abs() <= bound).all()


@pytest.mark.parametrize("encoding", OPERATORS)
@settings(max_examples=25)
@given(shape=shapes, values=st.sampled_from(sorted(VALUES)), tokens=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_a_function_decodes_what_is_stored(
    encoding: str, shape: tuple[int, int], values: str, tokens: int, seed: int
) -> None:
    check(OPERATORS[encoding], shape, values, tokens, seed, kernels=False)


@needs_operators
@pytest.mark.parametrize("encoding", OPERATORS)
@settings(max_examples=60)
@given(
    shape=shapes,
    values=st.sampled_from(sorted(VALUES)),
    tokens=st.sampled_from([1, 2, 5, 40]),
    seed=st.integers(0, 2**20),
)
def test_a_kernel_multiplies_what_is_stored(
    encoding: str, shape: tuple[int, int], values: str, tokens: int, seed: int
) -> None:
    check(OPERATORS[encoding], shape, values, tokens, seed, kernels=True)


@needs_operators
@pytest.mark.parametrize("encoding", OPERATORS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_matrix_may_be_empty_or_full(encoding: str, share: float, tmp_path: Path) -> None:
    mask = torch.full((9, 70), bool(share))
    matrix = SparseMatrix(mask, torch.randn(int(mask.sum())))
    write_operator(tmp_path, OPERATORS[encoding], (9, 70), constants(OPERATORS[encoding], matrix, "float32"))
    inputs = torch.randn(3, 70)
    for kernels in (True, False):
        torch.testing.assert_close(product(tmp_path, inputs, kernels), inputs @ matrix.to_dense().T)


@given(shape=shapes, density=st.sampled_from([0.0, 0.002, 0.02, 0.2, 1.0]), seed=st.integers(0, 2**20))
def test_csr_takes_a_byte_for_each_weight_and_for_64_zeros_in_a_run(
    shape: tuple[int, int], density: float, seed: int
) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    matrix = SparseMatrix(mask, torch.arange(1.0, int(mask.sum()) + 1))
    entries, zeros = [], 0
    for weight in matrix.to_dense().reshape(-1).tolist():
        zeros += 1
        if weight or zeros == 64:
            entries.append((zeros - 1, weight))
            zeros = 0
    parts = SPARSE["csr"].encode(matrix)
    assert list(zip(parts["gaps"].tolist(), parts["values"].tolist(), strict=True)) == entries


def test_wide_matrices_are_bitmaps_as_16_bit_columns_end() -> None:
    assert pick_encoding("csr", 2**16) is SPARSE["csr"]
    assert pick_encoding("csr", 2**16 + 1) is SPARSE["bitmap"]
    with pytest.raises(UsageError, match=r"unknown encoding 'crs' .*csr"):
        pick_encoding("crs", 8)


def test_floats_are_stored_as_they_are_and_integers_with_their_scales() -> None:
    matrix = random_matrix((5, 40), 3)
    stored, scales = with_values(matrix, "bfloat16")
    assert torch.equal(stored.values, matrix.values.bfloat16())
    assert torch.equal(scales, torch.ones(5))
    stored, scales = with_values(matrix, "int8")
    step = scales[:, None].expand(5, 40)[matrix.mask]
    assert ((stored.values * step - matrix.values).abs() <= step / 2 * 1.0001).all()
