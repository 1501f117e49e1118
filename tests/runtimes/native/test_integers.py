"""Values in int8: products are sums of integers, bit for bit, whoever computes them and however many at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_layers import ALL_FORMS, BITMAP, LISTS, SHAPES, SLOTS, available, layer, needs_library, random_matrix
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trim_export.artifact import Artifact
from trim_export.converters import SparseMatrix
from trim_export.converters.int8 import balance_columns, quantize_rows
from trim_export.errors import ArtifactError, UsageError
from trim_export.runtimes import SparseLinear, load, tensor_bytes
from trim_export.runtimes.native import FusedLinear, NativeLinear, NativeMatrix, Preference, sparse_linear
from trim_export.runtimes.native.integers import lay_out_int8
from trim_export.runtimes.native.library import isa, select_isa

pytestmark = needs_library

MOST_LIMIT = 2**15 - 1
"""Inputs are integers of 16 bits."""


@pytest.fixture
def _restore() -> Iterator[None]:
    before = isa()
    yield
    select_isa(before)


def integers(matrix: SparseMatrix) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """What a matrix is rounded to: the integers, and the scales of rows and columns."""
    balanced, column_scales = balance_columns(matrix)
    quantized, row_scales = quantize_rows(balanced)
    return quantized.to_dense().numpy().astype(np.int64), row_scales.numpy(), column_scales.numpy()


def exact_products(matrix: SparseMatrix, inputs: Tensor) -> NDArray[np.float32]:
    """Summed in int64, one token after the other; the step of each token is a power of two."""
    weight, row_scales, column_scales = integers(matrix)
    most = max(int(np.abs(weight).sum(axis=1).max()), 1)
    limit = min((2**24 - 1) // most, MOST_LIMIT)
    products = []
    for token in inputs.numpy().reshape(-1, inputs.shape[-1]):
        scaled = token.astype(np.float64) * column_scales
        largest = np.abs(scaled).max()
        power = 0 if largest < 2.0**-100 else math.floor(math.log2(limit / largest))
        steps = np.rint(scaled * 2.0**power) if largest >= 2.0**-100 else np.zeros_like(scaled)
        assert np.abs(steps).max() <= limit
        sums = steps.astype(np.int64) @ weight.T
        assert np.abs(sums).max() < 2**24
        products.append((sums.astype(np.float32) * row_scales) * np.float32(2.0**-power))
    return np.array(products, np.float32).reshape(*inputs.shape[:-1], matrix.shape[0])


def assert_same_bits(found: Tensor, expected: NDArray[np.float32]) -> None:
    assert found.shape == expected.shape
    assert (found.numpy().view(np.int32) == expected.view(np.int32)).all()


@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
@settings(max_examples=60)
@given(
    **SHAPES,
    tokens=st.sampled_from([1, 2, 3, 12, 13, 64, 130]),
    form=st.sampled_from([BITMAP, SLOTS, LISTS, ALL_FORMS]),
    size=st.sampled_from([1e-37, 1e-3, 1.0, 1e4, 1e36]),
    seed=st.integers(0, 2**20),
)
def test_products_are_sums_of_integers(
    name: str, rows: int, columns: int, density: float, tokens: int, form: Preference, size: float, seed: int
) -> None:
    select_isa(name)
    matrix = random_matrix(rows, columns, density, seed)
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) * size
    made = lay_out_int8(matrix, form)
    assert_same_bits(made.multiply(inputs, 2), exact_products(matrix, inputs))


@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("form", [BITMAP, SLOTS, LISTS, ALL_FORMS])
def test_instruction_sets_threads_and_tokens_change_no_bit(form: Preference) -> None:
    matrix = random_matrix(1500, 2048, 0.2)
    made, inputs = lay_out_int8(matrix, form), torch.randn(64, 2048)
    assert made.input_limit >= 255
    expected = exact_products(matrix, inputs)
    for name in available():
        select_isa(name)
        for tokens in (1, 3, 12, 64):
            for threads in (1, 2, 3):
                assert_same_bits(made.multiply(inputs[:tokens], threads), expected[:tokens])


def test_many_tokens_and_inputs_with_gaps() -> None:
    matrix = random_matrix(40, 130)
    made, inputs = lay_out_int8(matrix, ALL_FORMS), torch.randn(600, 260)[:, ::2]
    assert_same_bits(made.multiply(inputs, 2), exact_products(matrix, inputs))


@pytest.mark.parametrize("tokens", [1, 40])
def test_inputs_that_no_step_fits(tokens: int) -> None:
    matrix = random_matrix(9, 70, 1.0)
    made = lay_out_int8(matrix, ALL_FORMS)
    inputs = torch.zeros(tokens, 70)
    assert_same_bits(made.multiply(inputs, 1), np.zeros((tokens, 9), np.float32))
    inputs[0, 3] = 1e-40
    assert_same_bits(made.multiply(inputs, 1), np.zeros((tokens, 9), np.float32))
    for wrong in (math.nan, math.inf, -math.inf):
        inputs = torch.ones(tokens, 70)
        inputs[0, 3] = wrong
        found = made.multiply(inputs, 1)
        assert found[0].isnan().all()
        assert_same_bits(found[1:], exact_products(matrix, inputs[1:]))


def assert_inputs_round_to_half_a_step(made: NativeMatrix, matrix: SparseMatrix, inputs: Tensor) -> None:
    weight, row_scales, column_scales = integers(matrix)
    scaled = inputs.double().numpy() * column_scales
    exact = scaled @ (weight * row_scales[:, None].astype(np.float64)).T
    step = 2 * np.abs(scaled).max(axis=1, keepdims=True) / made.input_limit
    bound = step / 2 * (np.abs(weight).sum(axis=1) * row_scales)
    assert (np.abs(made.multiply(inputs, 2).double().numpy() - exact) <= bound * (1 + 1e-6)).all()


def test_inputs_round_to_half_a_step() -> None:
    matrix = random_matrix(50, 300)
    assert_inputs_round_to_half_a_step(lay_out_int8(matrix, ALL_FORMS), matrix, torch.randn(20, 300))


@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
def test_many_weights_in_a_row_have_sums_of_32_bits(name: str) -> None:
    select_isa(name)
    matrix = random_matrix(6, 4000, 5.0)
    most = np.abs(integers(matrix)[0]).sum(axis=1).max()
    made = lay_out_int8(matrix, ALL_FORMS)
    assert 2**24 / most < 255  # which would be too coarse
    assert made.input_limit == (2**31 - 1) // most
    for tokens in (1, 3, 20):
        assert_inputs_round_to_half_a_step(made, matrix, torch.randn(tokens, 4000))


def test_a_matrix_of_next_to_nothing_has_the_largest_limit() -> None:
    for values in (torch.tensor([]), torch.tensor([0.0])):
        mask = torch.zeros(3, 5, dtype=torch.bool)
        mask[1, 1] = len(values) > 0
        made = lay_out_int8(SparseMatrix(mask, values), ALL_FORMS)
        assert made.input_limit == MOST_LIMIT
        assert_same_bits(made.multiply(torch.randn(2, 5), 1), np.zeros((2, 3), np.float32))


# ---- rounding values ---------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), seed=st.integers(0, 2**20))
def test_balancing_columns_loses_no_bit(rows: int, columns: int, seed: int) -> None:
    matrix = random_matrix(rows, columns, 0.6, seed)
    balanced, scales = balance_columns(matrix)
    assert (scales.log2() == scales.log2().round()).all()
    assert torch.equal(balanced.mask, matrix.mask)
    assert torch.equal(balanced.to_dense() * scales, matrix.to_dense())


def test_columns_of_small_weights_keep_their_digits() -> None:
    sizes = 2.0 ** torch.arange(-10, 10).repeat(10)
    matrix = random_matrix(60, 200, 5.0)
    matrix = SparseMatrix.from_dense(matrix.to_dense() * sizes, matrix.mask)
    made = lay_out_int8(matrix, ALL_FORMS)
    error = (made.matrix().to_dense() - matrix.to_dense()).square().sum(dim=0)
    assert (error <= 0.1**2 * matrix.to_dense().square().sum(dim=0)).all()
    steps, scales = quantize_rows(matrix)
    lost = (steps.to_dense() * scales[:, None] - matrix.to_dense()).square().sum(dim=0)
    assert lost[::20].sum() > 0.5 * matrix.to_dense()[:, ::20].square().sum()  # of the smallest columns


def assert_rounded_once(made: NativeMatrix, stored: Tensor) -> None:
    """Each weight is within half a step of the stored one."""
    assert made.scales is not None
    assert made.input_scales is not None
    step = made.scales.double()[:, None] * made.input_scales.double()
    assert ((made.matrix().to_dense().double() - stored.double()).abs() <= 0.50001 * step).all()


# ---- as layers ---------------------------------------------------------------------------------------------------


def test_layers_compile_and_the_operator_is_well_formed() -> None:
    made = layer(random_matrix(9, 70), torch.int8, torch.randn(9))
    inputs = torch.randn(4, 70)
    arguments = (inputs, *made.weights.ready.tensors().values(), made.weights.ready.input_limit)
    torch.library.opcheck(sparse_linear, arguments)
    compiled = torch.compile(nn.Sequential(made), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), made(inputs))


@pytest.mark.parametrize("values", ["int8", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_model_is_loaded_with_rounded_values(pruned: Callable[..., Artifact], kind: str, values: str) -> None:
    path = pruned(kind).path
    dense, small = load(path, "dense"), load(path, "native", values=values)
    dtype = getattr(torch, values)
    joined: dict[nn.Module, list[Tensor]] = {}
    for name, module in small.named_modules():
        if not isinstance(module, SparseLinear):
            continue
        stored = dense.get_submodule(name).weight
        if isinstance(module, FusedLinear):
            joined.setdefault(module.shared.weights, []).append(stored.clone())
        else:
            assert isinstance(module, NativeLinear)
            joined[module.weights] = [stored.clone()]
        with torch.no_grad():
            stored.copy_(module.matrix().to_dense())
    assert len(joined) == 4 * small.config.num_hidden_layers  # q, k and v; o; gate and up; down
    for weights, parts in joined.items():
        made = weights.ready
        assert made.values.dtype is dtype
        if values == "int8":
            assert_rounded_once(made, torch.cat(parts))
        else:
            assert torch.equal(made.matrix().to_dense(), torch.cat(parts).bfloat16())
    assert tensor_bytes(small) < tensor_bytes(load(path, "native"))
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    tolerance = {"rtol": 0.01, "atol": 0.01} if values == "int8" else {"rtol": 1e-4, "atol": 1e-5}
    with torch.inference_mode():
        torch.testing.assert_close(small(tokens).logits, dense(tokens).logits, **tolerance)
        torch.testing.assert_close(small(tokens[:, :1]).logits, dense(tokens[:, :1]).logits, **tolerance)


def test_what_cannot_be_loaded_so_is_refused(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    path = pruned("llama").path
    with pytest.raises(UsageError, match=r"unknown form of values 'int4' .*known: bfloat16, int8, stored"):
        load(path, "native", values="int4")
    for runtime in ("torch-sparse", "dense"):
        message = f"runtime {runtime} holds values as they are stored; choose native or leave --values out"
        with pytest.raises(UsageError, match=message):
            load(path, runtime, values="int8")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UsageError, match="convert --to onnx decides on values; leave --values out"):
        load(tmp_path, values="int8")
    with pytest.raises(UsageError, match="rounded values is not what was stored"):
        load(path, "native", values="int8").save_pretrained(tmp_path)


def test_weights_that_are_no_numbers_are_named(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    damaged = tmp_path / "artifact"
    shutil.copytree(pruned("llama").path, damaged)
    shard = damaged / "block-00000.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight_values"][3] = math.inf
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model.layers.0.mlp.up_proj: holds NaN or infinity, which cannot be"):
        load(damaged, "native", values="int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_limit": 1}, "limit of inputs"),
        ({"input_limit": -1}, "limit of inputs"),
        ({"input_limit": MOST_LIMIT + 1}, "limit of inputs"),
        ({"input_scales": torch.ones(69)}, "needs input_scales"),
        ({"input_scales": torch.ones(70).double()}, "needs input_scales"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor | int], message: str) -> None:
    made = lay_out_int8(random_matrix(9, 70), ALL_FORMS)
    with pytest.raises(UsageError, match=message):
        replace(made, **change).multiply(torch.ones(2, 70), 1)  # type: ignore[arg-type]


def test_only_integers_are_multiplied_as_such() -> None:
    made = layer(random_matrix(9, 70)).weights.ready
    with pytest.raises(UsageError, match="limit of inputs"):
        replace(made, input_limit=300).multiply(torch.ones(2, 70), 1)
