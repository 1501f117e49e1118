"""torch's CSR and BSR kernels as linear layers, against float64 and bit for bit."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, assert_same, dense64, matrices
from torch import Tensor

from trim_export.converters import SparseMatrix
from trim_export.errors import UsageError
from trim_export.runtimes import Layout, tensor_bytes
from trim_export.runtimes.torch_sparse import TorchSparseLinear, TorchSparseRuntime, _say_upcast

CPU = torch.device("cpu")
BLOCKS = (None, (1, 1), (2, 2), (3, 3), (4, 4), (8, 8))


def random_matrix(
    rows: int, columns: int, density: float = 0.4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> SparseMatrix:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    return SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator).to(dtype))


def layer(matrix: SparseMatrix, bias: Tensor | None = None, block: tuple[int, int] | None = None) -> TorchSparseLinear:
    made = TorchSparseRuntime().linear(matrix, bias, Layout(CPU, block))
    assert isinstance(made, TorchSparseLinear)
    return made


def assert_multiplies(made: TorchSparseLinear, matrix: SparseMatrix, bias: Tensor | None, inputs: Tensor) -> None:
    output = made(inputs)
    expected = inputs.double().numpy() @ dense64(matrix).T
    magnitude = np.abs(inputs.double().numpy()) @ np.abs(dense64(matrix)).T
    if bias is not None:
        expected = expected + bias.double().numpy()
        magnitude = magnitude + np.abs(bias.double().numpy())
    assert output.dtype == inputs.dtype
    assert output.shape == expected.shape
    # The bound of a rounded sum of products; the output is rounded once more to the inputs' dtype.
    precision = torch.finfo(inputs.dtype).eps * 2 + torch.finfo(torch.float32).eps * (matrix.shape[1] + 2)
    assert (np.abs(output.double().numpy() - expected) <= precision * magnitude + 1e-12).all()


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 37), st.integers(1, 37)),
    density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    batch=st.sampled_from([(1,), (), (2,), (7,), (1, 1), (2, 3), (2, 1, 5), (0,), (0, 3)]),
    block=st.sampled_from(BLOCKS),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example(shape=(5, 7), density=0.0, batch=(3,), block=(4, 4), with_bias=True, seed=0)
@example(shape=(5, 7), density=0.0, batch=(1,), block=None, with_bias=False, seed=0)
def test_products_agree_with_float64(
    shape: tuple[int, int],
    density: float,
    batch: tuple[int, ...],
    block: tuple[int, int] | None,
    with_bias: bool,
    seed: int,
) -> None:
    matrix = random_matrix(*shape, density, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    inputs = torch.randn(*batch, shape[1], generator=generator)
    assert_multiplies(layer(matrix, bias, block), matrix, bias, inputs)


@pytest.mark.parametrize("block", [None, (4, 4)])
@pytest.mark.parametrize("tokens", [1, 6])
def test_inputs_need_not_be_contiguous(tokens: int, block: tuple[int, int] | None) -> None:
    matrix = random_matrix(9, 13)
    inputs = torch.randn(13, 2 * tokens)[:, ::2].T
    assert_multiplies(layer(matrix, None, block), matrix, None, inputs)
    expanded = torch.randn(1, 1, 13).expand(2, tokens, 13)
    assert_multiplies(layer(matrix, None, block), matrix, None, expanded)


@pytest.mark.parametrize("block", [None, (4, 4)])
def test_empty_rows_and_columns(block: tuple[int, int] | None) -> None:
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[[1, 5]] = True
    mask[:, 3] = False
    matrix = SparseMatrix(mask, torch.randn(int(mask.sum())))
    made = layer(matrix, None, block)
    assert_multiplies(made, matrix, None, torch.randn(4, 12))
    assert_multiplies(made, matrix, None, torch.randn(1, 12))
    assert made(torch.randn(4, 12))[:, [0, 2, 9]].eq(0).all()


@pytest.mark.parametrize("block", [None, (4, 4)])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("computed", DTYPES)
def test_any_stored_dtype_multiplies_any_input_dtype(
    stored: torch.dtype, computed: torch.dtype, block: tuple[int, int] | None
) -> None:
    matrix = random_matrix(9, 14, dtype=stored)
    bias = torch.randn(9).to(computed)
    made = layer(matrix, bias, block)
    for tokens in (1, 5):
        assert_multiplies(made, matrix, bias, torch.randn(2, tokens, 14).to(computed))


@settings(max_examples=100, deadline=None)
@given(matrix=matrices())
def test_a_csr_layer_gives_its_matrix_back(matrix: SparseMatrix) -> None:
    assert_same(layer(matrix).matrix(), matrix)


@settings(max_examples=100, deadline=None)
@given(matrix=matrices(), side=st.integers(1, 5))
def test_a_bsr_layer_gives_back_what_is_not_zero(matrix: SparseMatrix, side: int) -> None:
    expected = SparseMatrix.from_dense(matrix.to_dense())
    assert_same(layer(matrix, None, (side, side)).matrix(), expected)


@pytest.mark.parametrize("block", [None, (4, 4)])
@pytest.mark.parametrize("columns", [2**15, 2**15 + 4, 2**17 + 4])
def test_wide_matrices_come_back(columns: int, block: tuple[int, int] | None) -> None:
    mask = torch.zeros(3, columns, dtype=torch.bool)
    mask[0, -1] = mask[2, 0] = mask[2, columns // 2] = True
    matrix = SparseMatrix(mask, torch.tensor([1.0, 2.0, 3.0]))
    made = layer(matrix, None, block)
    assert_same(made.matrix(), matrix)
    assert made(torch.ones(columns)).tolist() == [1, 0, 5]


def test_blocks_that_torch_cannot_multiply_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^torch multiplies only square blocks on the CPU, not 4x8; use --runtime"):
        layer(random_matrix(8, 8), None, (4, 8))


def test_a_copy_is_independent() -> None:
    matrix, inputs = random_matrix(6, 8), torch.randn(3, 8)
    made = layer(matrix, torch.randn(6))
    twin = copy.deepcopy(made)
    expected = made(inputs)
    assert torch.equal(twin(inputs), expected)
    assert_same(twin.matrix(), matrix)
    made.values.zero_()
    assert torch.equal(twin(inputs), expected)
    twin.values.zero_()
    assert torch.equal(twin(inputs), twin.bias.expand(3, 6))


@pytest.mark.parametrize("block", [None, (4, 4)])
def test_moving_keeps_weights_and_results(block: tuple[int, int] | None) -> None:
    matrix, inputs = random_matrix(6, 8), torch.randn(3, 8)
    made = layer(matrix, torch.randn(6), block)
    expected = made(inputs)
    assert torch.equal(made.to("cpu")(inputs), expected)
    assert_same(made.matrix(), matrix)
    assert made.columns.dtype == made.row_ptr.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [None, (4, 4)])
def test_casting_rounds_the_weights_as_it_does_in_a_linear(block: tuple[int, int] | None, dtype: torch.dtype) -> None:
    matrix = random_matrix(6, 8)
    bias = torch.randn(6)
    made = layer(matrix, bias.clone(), block).to(dtype)
    assert made.bias is not None
    assert torch.equal(made.bias, bias.to(dtype))
    rounded = SparseMatrix(matrix.mask, matrix.values.to(dtype))
    for tokens in (1, 3):
        assert_multiplies(made, rounded, bias.to(dtype), torch.randn(tokens, 8).to(dtype))


def test_what_a_layer_says_of_itself() -> None:
    made = layer(random_matrix(6, 8), torch.zeros(6))
    assert (made.in_features, made.out_features) == (8, 6)
    assert repr(made) == "TorchSparseLinear(in_features=8, out_features=6, bias=True)"
    assert made.state_dict().keys() == {"bias"}
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_bytes_in_memory() -> None:
    matrix = random_matrix(6, 8)
    assert tensor_bytes(layer(matrix)) == matrix.nnz * (4 + 4) + 7 * 4
    assert tensor_bytes(layer(matrix, torch.zeros(6))) == matrix.nnz * (4 + 4) + 7 * 4 + 6 * 4


def test_wider_values_in_memory_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _say_upcast.cache_clear()
    with caplog.at_level(logging.WARNING):
        layer(random_matrix(4, 4))
        assert caplog.messages == []
        for _ in range(3):
            layer(random_matrix(4, 4, dtype=torch.bfloat16))
    assert caplog.messages == [
        "torch has no CPU kernel for sparse torch.bfloat16: torch-sparse holds these values in float32"
    ]


def test_it_is_always_available() -> None:
    assert TorchSparseRuntime().unavailable() is None
