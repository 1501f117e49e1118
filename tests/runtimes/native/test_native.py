"""Native layers against float64, on every instruction set that this machine has, and what is refused."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_layers import (
    ALL_FORMS,
    BITMAP,
    CPU,
    LISTS,
    SHAPES,
    SLOTS,
    STORED,
    available,
    laid_out,
    layer,
    needs_library,
    random_matrix,
)
from strategies import DTYPES, assert_same, dense64, matrices
from torch import Tensor, nn

from trim_export.converters import SparseMatrix
from trim_export.errors import EnvironmentLacks, TrimExportError, UsageError
from trim_export.runtimes import pick_runtime
from trim_export.runtimes.native import (
    MaskedLinear,
    NativeLinear,
    NativeMatrix,
    NativeRuntime,
    Preference,
    lay_out,
    sparse_linear,
)
from trim_export.runtimes.native import library as native_library
from trim_export.runtimes.native.library import TAIL, isa, select_isa


@pytest.fixture
def _restore() -> Iterator[None]:
    before = isa()
    yield
    select_isa(before)


def weights(made: NativeMatrix) -> np.ndarray:
    """What a layer multiplies by, in float64: of int8 the products that are never rounded to float32."""
    if made.scales is None:
        return dense64(made.matrix())
    columns = 1.0 if made.input_scales is None else made.input_scales.double().numpy()
    whole = np.rint(dense64(made.matrix()) / np.maximum(made.scales.double().numpy(), 1e-300)[:, None] / columns)
    return whole * made.scales.double().numpy()[:, None] * columns


def assert_multiplies(made: NativeMatrix, inputs: Tensor, output: Tensor, bias: Tensor | None = None) -> None:
    expected = inputs.double().numpy() @ weights(made).T
    magnitude = np.abs(inputs.double().numpy()) @ np.abs(weights(made)).T
    if bias is not None:
        expected = expected + bias.double().numpy()
        magnitude = magnitude + np.abs(bias.double().numpy())
    assert output.dtype == inputs.dtype
    assert output.shape == expected.shape
    rounding = torch.finfo(inputs.dtype).eps if inputs.dtype != torch.float32 else 0.0
    bound = (1e-6 + 2 * rounding) * magnitude + 1e-30
    if made.input_limit and inputs.numel():  # inputs are rounded to integers: by half of a step at most
        scaled = inputs.double() if made.input_scales is None else inputs.double() * made.input_scales
        bound += scaled.abs().amax(dim=-1, keepdim=True).numpy() / made.input_limit * integers_of(made)
    assert (np.abs(output.double().numpy() - expected) <= bound).all()


def integers_of(made: NativeMatrix) -> np.ndarray:
    """For each row of int8 values the sum of their sizes, times its scale."""
    columns = 1.0 if made.input_scales is None else made.input_scales.double().numpy()
    sizes: np.ndarray = np.abs(weights(made) / columns).sum(axis=1)
    return sizes


@needs_library
@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
@settings(max_examples=60)
@given(
    **SHAPES,
    tokens=st.sampled_from([0, 1, 2, 5, 7, 8, 9, 13, 16, 33, 130]),
    stored=st.sampled_from(STORED),
    form=st.builds(Preference, st.sampled_from([-1.0, 0.1, 0.5, 1.0]), st.sampled_from([0.0, 3.0, math.inf])),
    seed=st.integers(0, 2**20),
)
def test_products_agree_with_float64(
    name: str, rows: int, columns: int, density: float, tokens: int, stored: torch.dtype, form: Preference, seed: int
) -> None:
    select_isa(name)
    made = laid_out(random_matrix(rows, columns, density, seed), stored, form)
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    assert_multiplies(made, inputs, made.multiply(inputs, 2))


@needs_library
@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("form", [BITMAP, SLOTS, LISTS])
def test_a_wide_layer_is_as_exact_as_float32_allows(
    name: str, stored: torch.dtype, tokens: int, form: Preference
) -> None:
    select_isa(name)
    made = laid_out(random_matrix(64, 11008, 0.2), stored, form)
    inputs = torch.randn(tokens, 11008, generator=torch.Generator().manual_seed(1))
    expected = inputs.double().numpy() @ weights(made).T
    error = np.linalg.norm(made.multiply(inputs, 1).double().numpy() - expected) / np.linalg.norm(expected)
    assert error <= 1e-6


@needs_library
@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_any_number_of_threads_gives_the_same_bits(name: str, stored: torch.dtype, tokens: int) -> None:
    select_isa(name)
    made = laid_out(random_matrix(4000, 300), stored, ALL_FORMS)
    inputs = torch.randn(tokens, 300)
    alone = made.multiply(inputs, 1)
    for threads in (2, 3, 7, 64):
        assert torch.equal(made.multiply(inputs, threads), alone)


@needs_library
@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
def test_a_token_among_others_gives_the_same_bits_however_many_they_are(name: str) -> None:
    select_isa(name)
    made = layer(random_matrix(50, 300))
    inputs = torch.randn(300, 300)
    all_at_once = made(inputs)
    one_by_one = torch.cat([made(token[None]) for token in inputs])
    for tokens in (2, 5, 8, 12, 13, 100, 257):
        expected = one_by_one if torch.equal(made(inputs[:tokens])[0], one_by_one[0]) else all_at_once
        assert torch.equal(made(inputs[:tokens]), expected[:tokens])
    assert torch.equal(made(inputs[:257]), all_at_once[:257])


@needs_library
@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_infinities_stay_in_their_row(name: str, stored: torch.dtype, tokens: int) -> None:
    select_isa(name)
    matrix = random_matrix(8, 130)
    matrix.values[5] = float("inf")
    matrix.values[-1] = float("nan")
    affected = {int(row) for row in matrix.mask.nonzero()[[5, -1], 0]}
    output = layer(matrix, stored)(torch.ones(tokens, 130))
    assert {int(row) for row in (~output.isfinite()).any(dim=0).nonzero()} == affected


@needs_library
def test_half_precision_subnormals() -> None:
    values = torch.tensor([0x0001, 0x03FF, 0x8001, 0x0400, 0x7BFF], dtype=torch.int32).to(torch.int16)
    half = values.view(torch.float16)
    for name in available():
        select_isa(name)
        made = NativeLinear(SparseMatrix(torch.eye(5, dtype=torch.bool), half), None, CPU)
        for tokens in (1, 2):
            assert torch.equal(made(torch.ones(tokens, 5)), half.float().expand(tokens, 5))
    select_isa(None)


@needs_library
@pytest.mark.parametrize("computed", DTYPES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("batch", [(1,), (), (2, 3), (0,), (2, 0)])
def test_any_stored_dtype_multiplies_inputs_of_any_dtype_and_shape(
    stored: torch.dtype, computed: torch.dtype, batch: tuple[int, ...]
) -> None:
    made = layer(random_matrix(9, 70), stored, torch.randn(9).to(computed))
    inputs = torch.randn(*batch, 70).to(computed)
    assert_multiplies(made.weights.ready, inputs, made(inputs), made.bias)


@needs_library
def test_inputs_need_not_be_contiguous() -> None:
    made = layer(random_matrix(9, 70))
    for inputs in (
        torch.randn(70, 6)[:, ::2].T,
        torch.randn(5, 140)[::2, ::2],
        torch.randn(5, 80)[:, 3:73],
        torch.randn(70).expand(4, 70),
        torch.randn(140)[::2],
        torch.randn(2, 3, 70).transpose(0, 1),
    ):
        assert_multiplies(made.weights.ready, inputs, made(inputs))


@needs_library
@settings(max_examples=60)
@given(matrix=matrices(), form=st.sampled_from([BITMAP, SLOTS, LISTS, ALL_FORMS, Preference(1.0, 12.0)]))
def test_a_layer_gives_its_matrix_back(matrix: SparseMatrix, form: Preference) -> None:
    assert_same(lay_out(matrix, None, form).matrix(), matrix)
    assert_same(NativeLinear(matrix, None, CPU).matrix(), matrix)
    assert_same(MaskedLinear(matrix, None, CPU).matrix(), matrix)


@needs_library
def test_columns_beyond_the_reach_of_a_list() -> None:
    matrix = random_matrix(6, 2**16 + 70, 0.01)
    assert not len(lay_out(matrix, None, SLOTS).list_columns)
    matrix = SparseMatrix(matrix.mask[:, : 2**16], torch.randn(int(matrix.mask[:, : 2**16].sum())))
    for form in (SLOTS, LISTS):
        made = lay_out(matrix, None, form)
        assert not len(made.mask)
        for tokens in (1, 13):
            inputs = torch.randn(tokens, 2**16)
            assert_multiplies(made, inputs, made.multiply(inputs, 1))


@needs_library
def test_a_copy_is_independent_and_a_cast_rounds_as_in_a_linear() -> None:
    matrix, inputs = random_matrix(6, 80), torch.randn(3, 80)
    made = layer(matrix, torch.float32, torch.randn(6))
    expected = made(inputs)
    twin = copy.deepcopy(made)
    for part in (made.weights.values, made.weights.slot_values, made.weights.list_values):
        part.zero_()
    assert torch.equal(twin(inputs), expected)
    twin.to(torch.bfloat16)
    assert twin.bias is not None
    assert twin.bias.dtype == torch.bfloat16
    assert_same(twin.matrix(), SparseMatrix(matrix.mask, matrix.values.to(torch.bfloat16)))
    assert_multiplies(twin.weights.ready, inputs.bfloat16(), twin(inputs.bfloat16()), twin.bias)


@needs_library
def test_a_cast_leaves_eight_bit_weights_alone() -> None:
    made, inputs = layer(random_matrix(6, 80), torch.int8), torch.randn(2, 80)
    before, expected = made.matrix(), made(inputs)
    assert_same(made.to(torch.bfloat16).matrix(), before)
    assert torch.equal(made(inputs), expected)


@needs_library
def test_bytes_in_memory() -> None:
    matrix = random_matrix(6, 80)
    structure = 6 * 4 + 6 * 4
    bitmap = structure + 2 * 2 * 4 * 8 + 3 * 8 + 1 * 8 + 1 * 8
    assert held(laid_out(matrix, torch.bfloat16, BITMAP)) == bitmap + (matrix.nnz + TAIL) * 2
    assert held(laid_out(matrix, torch.int8, BITMAP)) == bitmap + matrix.nnz + TAIL + 6 * 4
    steps = int(matrix.row_counts.max())
    no_slots = 2 * 8
    lists = structure + 1 * 8 + no_slots + 2 * 8 + (steps + steps % 2) * 8 * (2 + 2)
    assert held(laid_out(matrix, torch.bfloat16, LISTS)) == lists + TAIL * 2
    made = laid_out(matrix, torch.bfloat16, SLOTS)
    in_slots = int(made.slot_start[-1]) * (4 + 8 * 2)
    assert held(made) - made.list_columns.numel() * (2 + 2) == structure + 1 * 8 + 2 * 8 + 2 * 8 + in_slots + TAIL * 2


def held(made: NativeMatrix) -> int:
    return sum(part.numel() * part.element_size() for part in made.tensors().values() if part is not None)


# ---- the operator ------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_the_operator_is_well_formed(stored: torch.dtype, tokens: int) -> None:
    made = layer(random_matrix(9, 70), stored)
    ready = made.weights.ready
    arguments = (torch.randn(tokens, 70), *ready.tensors().values(), ready.input_limit)
    torch.library.opcheck(sparse_linear, arguments)


@needs_library
def test_compiled_and_exported_models_call_it() -> None:
    model = nn.Sequential(layer(random_matrix(9, 70), torch.bfloat16, torch.randn(9)), nn.ReLU())
    inputs = torch.randn(4, 70)
    expected = model(inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), expected)
    exported = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert [node for node in exported.graph.nodes if node.target == torch.ops.trim_export.sparse_linear.default]
    assert torch.equal(exported.module()(inputs[:3]), model(inputs[:3]))


# ---- what is refused ---------------------------------------------------------------------------------------------


def parts(form: Preference) -> dict[str, Any]:
    made = laid_out(random_matrix(9, 70), torch.float32, form)
    return {"columns": 70, **made.tensors()}


@needs_library
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(
    ("form", "name", "change", "message"),
    [
        (BITMAP, "columns", lambda n: 64, "needs mask as torch.int64"),
        (BITMAP, "columns", lambda n: 0, "some columns"),
        (BITMAP, "order", lambda t: t.long(), "needs order as torch.int32"),
        (BITMAP, "order", lambda t: t[:-1], "needs counts"),
        (BITMAP, "order", lambda t: t[:0], "needs counts"),
        (BITMAP, "order", lambda t: t[None], "needs an order"),
        (BITMAP, "order", lambda t: t.to("meta"), "on the CPU"),
        (BITMAP, "order", lambda t: t - 1, "a row that does not exist"),
        (BITMAP, "order", lambda t: t + 1, "a row that does not exist"),
        (BITMAP, "mask", lambda t: t[:, :1], "needs mask"),
        (BITMAP, "mask", lambda t: torch.cat([t, t]), "needs mask"),
        (BITMAP, "mask", lambda t: t.int(), "needs mask as torch.int64"),
        (BITMAP, "mask", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "needs mask without gaps"),
        (BITMAP, "mask", lambda t: t | 1, "disagree"),
        (BITMAP, "mask", lambda t: t & 1, "disagree"),
        (BITMAP, "mask", lambda t: torch.full_like(t, -1), "disagree"),
        (BITMAP, "group_start", lambda t: t[:-1], "needs group_start"),
        (BITMAP, "group_start", lambda t: t + 1, "disagree"),
        (BITMAP, "group_start", lambda t: t * 2**40, "disagree"),
        (BITMAP, "group_start", lambda t: t.flip(0), "disagree"),
        (BITMAP, "values", lambda t: t[:-1], "disagree"),
        (BITMAP, "values", lambda t: t[:63], "wrong length"),
        (BITMAP, "values", lambda t: t[:0], "wrong length"),
        (BITMAP, "values", lambda t: t.double(), "needs slot_values as torch.float64"),
        (BITMAP, "values", lambda t: t[None], "needs values"),
        (BITMAP, "scales", lambda _: torch.ones(9), "with scales"),
        (BITMAP, "scales", lambda _: torch.ones(8), "needs scales"),
        (SLOTS, "slot_start", lambda t: t[:-1], "needs slot_start"),
        (SLOTS, "slot_start", lambda t: t + 1, "disagree"),
        (SLOTS, "slot_start", lambda t: t * 2, "disagree"),
        (SLOTS, "slot_start", lambda t: t * 2**40, "disagree"),
        (SLOTS, "slot_start", lambda t: t.flip(0), "disagree"),
        (SLOTS, "slot_start", lambda t: torch.cat([t[:1], t[1:-1] + 1, t[-1:]]), "disagree"),
        (SLOTS, "slot_columns", lambda t: t[:-1], "needs slot_values"),
        (SLOTS, "slot_columns", lambda t: t.view(torch.int16), "needs slot_columns as torch.int32"),
        (SLOTS, "slot_values", lambda t: t[:-8], "needs slot_values"),
        (SLOTS, "slot_values", lambda t: t.half(), "needs slot_values as torch.float32"),
        (LISTS, "list_start", lambda t: t[:-1], "needs list_start"),
        (LISTS, "list_start", lambda t: t + 1, "disagree"),
        (LISTS, "list_start", lambda t: t.flip(0), "disagree"),
        (LISTS, "list_start", lambda t: t - t % 64 // 8, "disagree"),
        (LISTS, "list_columns", lambda t: t.int(), "needs list_columns as torch.int16"),
        (LISTS, "list_columns", lambda t: t[:-16], "needs list_values"),
        (LISTS, "list_values", lambda t: t[:-16], "needs list_values"),
        (LISTS, "list_values", lambda t: t.half(), "needs list_values as torch.float32"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    form: Preference, name: str, change: Callable[[Any], Any], message: str, tokens: int
) -> None:
    given = parts(form)
    given[name] = change(given[name])
    with pytest.raises(UsageError, match=message):
        NativeMatrix(**given).multiply(torch.randn(tokens, 70), 2)


@needs_library
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(2, 70).double(), "needs inputs as torch.float32"),
        (torch.ones(2, 64), r"\[\.\.\., 70\]"),
        (torch.ones(2, 0), r"\[\.\.\., 70\]"),
        (torch.ones(()), r"\[\.\.\., 70\]"),
        (torch.ones(2, 70, device="meta"), "on the CPU"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NativeMatrix(**parts(ALL_FORMS)).multiply(inputs, 2)


@needs_library
@pytest.mark.parametrize("tokens", [13, 20])
def test_columns_that_do_not_exist_never_reach_memory(tokens: int) -> None:
    given = parts(LISTS)
    given["list_columns"] |= 2**14
    broken = NativeMatrix(**given)
    assert broken.multiply(torch.ones(1, 70), 1).shape == (1, 9)
    with pytest.raises(UsageError, match="disagree"):
        broken.multiply(torch.ones(tokens, 70), 1)


@needs_library
@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_a_number_of_threads_that_cannot_be(threads: int) -> None:
    with pytest.raises(UsageError, match="thread"):
        NativeMatrix(**parts(ALL_FORMS)).multiply(torch.ones(1, 70), threads)


@needs_library
def test_an_instruction_set_is_chosen_by_the_environment() -> None:
    script = "from trim_export.runtimes.native.library import isa; print(isa())"
    for wanted, code, said in (("portable", 0, "portable"), ("mmx", 1, "this build has no such instruction set")):
        run = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, native_library.ISA_VARIABLE: wanted},
        )
        assert (run.returncode, said in run.stdout + run.stderr) == (code, True)


@needs_library
def test_the_best_instruction_set_is_in_use_unless_another_was_selected() -> None:
    select_isa(None)
    assert isa() == available()[-1]
    with pytest.raises(EnvironmentLacks, match="instruction set mmx: this build has no such instruction set"):
        select_isa("mmx")


# ---- the runtime -------------------------------------------------------------------------------------------------


@needs_library
def test_it_is_there_for_the_processor_and_nothing_else() -> None:
    assert pick_runtime("native").name == "native"
    assert pick_runtime("auto", "cuda").name == "torch-sparse"
    with pytest.raises(UsageError, match="runtime native executes on cpu, not on cuda; choose another"):
        pick_runtime("native", "cuda")


def test_without_the_library_another_runtime_serves_and_ours_says_why() -> None:
    with mock.patch("trim_export.runtimes.native.runtime.library", return_value=None):
        assert pick_runtime("auto").name == "torch-sparse"
        with pytest.raises(EnvironmentLacks, match="runtime native: its library is not installed; install a C"):
            pick_runtime("native")
    with mock.patch.object(native_library, "library", return_value=None), pytest.raises(TrimExportError):
        isa()


def test_a_matrix_that_is_hardly_sparse_is_multiplied_dense() -> None:
    matrix, inputs = random_matrix(6, 40, 5.0), torch.randn(3, 40)
    made = NativeRuntime().linear(matrix, torch.randn(6), CPU)
    assert isinstance(made, MaskedLinear)
    assert made.bias is not None
    expected = nn.functional.linear(inputs, matrix.to_dense(), made.bias)
    torch.testing.assert_close(made(inputs), expected)
    assert isinstance(NativeRuntime().linear(random_matrix(6, 40, 0.2), None, CPU), NativeLinear)
