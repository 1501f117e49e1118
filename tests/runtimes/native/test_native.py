"""Native layers against float64, on every instruction set that this machine has, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, assert_same, dense64, matrices
from torch import Tensor, nn

from trim_export.converters import SparseMatrix
from trim_export.converters.bitmap_4x64 import quantize_rows
from trim_export.errors import EnvironmentLacks, TrimExportError, UsageError
from trim_export.runtimes import Layout, pick_runtime, tensor_bytes
from trim_export.runtimes.native import MaskedLinear, NativeLinear, NativeRuntime, sparse_linear
from trim_export.runtimes.native import library as native_library
from trim_export.runtimes.native.library import TAIL, isa, library, multiply, select_isa

needs_library = pytest.mark.skipif(library() is None, reason="installed without the library")
CPU = Layout(torch.device("cpu"))
STORED = (*DTYPES, torch.int8)


def available() -> list[str]:
    if library() is None:
        return []
    names, before = [], isa()
    for name in ("portable", "avx2", "avx512"):
        try:
            select_isa(name)
        except EnvironmentLacks:
            continue
        names.append(name)
    select_isa(before)
    return names


@pytest.fixture
def _restore() -> Iterator[None]:
    before = isa()
    yield
    select_isa(before)


def random_matrix(rows: int, columns: int, density: float = 0.3, seed: int = 0) -> SparseMatrix:
    """Rows of very different density."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density * 2 * torch.rand(rows, 1, generator=generator)
    return SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator))


def layer(matrix: SparseMatrix, stored: torch.dtype = torch.float32, bias: Tensor | None = None) -> NativeLinear:
    if stored == torch.int8:
        quantized, scales = quantize_rows(matrix)
        return NativeLinear(quantized, bias, CPU, scales)
    return NativeLinear(SparseMatrix(matrix.mask, matrix.values.to(stored)), bias, CPU)


def weights(made: NativeLinear) -> np.ndarray:
    """What a layer multiplies by, in float64: of int8 the products that are never rounded to float32."""
    if made.scales is None:
        return dense64(made.matrix())
    whole = np.rint(dense64(made.matrix()) / np.maximum(made.scales.double().numpy(), 1e-300)[:, None])
    return whole * made.scales.double().numpy()[:, None]


def assert_multiplies(made: NativeLinear, inputs: Tensor, output: Tensor, tolerance: float = 1e-6) -> None:
    expected = inputs.double().numpy() @ weights(made).T
    magnitude = np.abs(inputs.double().numpy()) @ np.abs(weights(made)).T
    if made.bias is not None:
        expected = expected + made.bias.double().numpy()
        magnitude = magnitude + np.abs(made.bias.double().numpy())
    assert output.dtype == inputs.dtype
    assert output.shape == expected.shape
    rounding = torch.finfo(inputs.dtype).eps if inputs.dtype != torch.float32 else 0.0
    assert (np.abs(output.double().numpy() - expected) <= (tolerance + 2 * rounding) * magnitude + 1e-30).all()


@needs_library
@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
@settings(max_examples=60)
@given(
    rows=st.integers(1, 21),
    columns=st.sampled_from([1, 7, 8, 31, 63, 64, 65, 127, 200]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    tokens=st.sampled_from([0, 1, 2, 3, 7, 8, 9, 16, 33, 130]),
    stored=st.sampled_from(STORED),
    seed=st.integers(0, 2**20),
)
def test_products_agree_with_float64(
    name: str, rows: int, columns: int, density: float, tokens: int, stored: torch.dtype, seed: int
) -> None:
    select_isa(name)
    made = layer(random_matrix(rows, columns, density, seed), stored)
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    assert_multiplies(made, inputs, made(inputs))


@needs_library
@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_wide_layer_is_as_exact_as_float32_allows(name: str, stored: torch.dtype, tokens: int) -> None:
    select_isa(name)
    made = layer(random_matrix(64, 11008, 0.2), stored)
    inputs = torch.randn(tokens, 11008, generator=torch.Generator().manual_seed(1))
    expected = inputs.double().numpy() @ weights(made).T
    error = np.linalg.norm(made(inputs).double().numpy() - expected) / np.linalg.norm(expected)
    assert error <= 1e-6


@needs_library
@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_any_number_of_threads_gives_the_same_bits(name: str, stored: torch.dtype, tokens: int) -> None:
    select_isa(name)
    made = layer(random_matrix(700, 300), stored)
    inputs = torch.randn(tokens, 300)
    parts = (made.order, made.mask, made.group_start, made.values, made.scales)
    alone = multiply(inputs, *parts, threads=1)
    for threads in (2, 3, 7, 64):
        assert torch.equal(multiply(inputs, *parts, threads=threads), alone)


@needs_library
@pytest.mark.usefixtures("_restore")
@pytest.mark.parametrize("name", available())
def test_a_token_among_others_gives_the_same_bits_however_many_they_are(name: str) -> None:
    select_isa(name)
    made = layer(random_matrix(50, 300))
    inputs = torch.randn(300, 300)
    all_at_once = made(inputs)
    for tokens in (2, 5, 8, 100, 257):
        assert torch.equal(made(inputs[:tokens]), all_at_once[:tokens])


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
    assert_multiplies(made, inputs, made(inputs))


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
        assert_multiplies(made, inputs, made(inputs))


@needs_library
@settings(max_examples=60)
@given(matrix=matrices())
def test_a_layer_gives_its_matrix_back(matrix: SparseMatrix) -> None:
    assert_same(NativeLinear(matrix, None, CPU).matrix(), matrix)
    assert_same(MaskedLinear(matrix, None, CPU).matrix(), matrix)


@needs_library
def test_a_copy_is_independent_and_a_cast_rounds_as_in_a_linear() -> None:
    matrix, inputs = random_matrix(6, 80), torch.randn(3, 80)
    made = layer(matrix, torch.float32, torch.randn(6))
    expected = made(inputs)
    twin = copy.deepcopy(made)
    made.values.zero_()
    assert torch.equal(twin(inputs), expected)
    twin.to(torch.bfloat16)
    assert twin.bias is not None
    assert twin.bias.dtype == torch.bfloat16
    assert_same(twin.matrix(), SparseMatrix(matrix.mask, matrix.values.to(torch.bfloat16)))
    assert_multiplies(twin, inputs.bfloat16(), twin(inputs.bfloat16()))


@needs_library
def test_a_cast_leaves_eight_bit_weights_alone() -> None:
    made = layer(random_matrix(6, 80), torch.int8)
    before = made.matrix()
    assert_same(made.to(torch.bfloat16).matrix(), before)
    assert_multiplies(made, torch.ones(2, 80), made(torch.ones(2, 80)))


@needs_library
def test_bytes_in_memory() -> None:
    matrix = random_matrix(6, 80)
    structure = 6 * 4 + 2 * 2 * 4 * 8 + 3 * 8
    assert tensor_bytes(layer(matrix, torch.bfloat16)) == structure + (matrix.nnz + TAIL) * 2
    assert tensor_bytes(layer(matrix, torch.int8)) == structure + matrix.nnz + TAIL + 6 * 4


# ---- the operator ------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_the_operator_is_well_formed(stored: torch.dtype, tokens: int) -> None:
    made = layer(random_matrix(9, 70), stored)
    arguments = (torch.randn(tokens, 70), made.order, made.mask, made.group_start, made.values, made.scales)
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


def parts(stored: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    made = layer(random_matrix(9, 70), stored)
    return {
        "inputs": torch.randn(2, 70),
        "order": made.order,
        "mask": made.mask,
        "group_start": made.group_start,
        "values": made.values,
        "scales": made.scales,
    }


@needs_library
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("inputs", lambda t: t.double(), "needs inputs as torch.float32"),
        ("inputs", lambda t: t[0], r"needs inputs \[tokens, columns\]"),
        ("inputs", lambda t: t[:, :64], "needs mask as torch.int64"),
        ("inputs", lambda t: t[:, :0], "needs mask"),
        ("inputs", lambda t: t.to("meta"), "on the CPU"),
        ("order", lambda t: t.long(), "needs order as torch.int32"),
        ("order", lambda t: t[:-1], "needs mask|needs group_start|refused"),
        ("order", lambda t: t[:0], "needs mask"),
        ("order", lambda t: t - 1, "a row that does not exist"),
        ("order", lambda t: t + 1, "a row that does not exist"),
        ("mask", lambda t: t[:, :1], "needs mask"),
        ("mask", lambda t: t.int(), "needs mask as torch.int64"),
        ("mask", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "needs mask without gaps"),
        ("mask", lambda t: t | 1, "disagree"),
        ("mask", lambda t: t & 1, "disagree"),
        ("mask", lambda t: torch.full_like(t, -1), "disagree"),
        ("group_start", lambda t: t[:-1], "needs group_start"),
        ("group_start", lambda t: t + 1, "disagree"),
        ("group_start", lambda t: t * 2**40, "disagree"),
        ("group_start", lambda t: t.flip(0), "disagree"),
        ("values", lambda t: t[:-1], "disagree"),
        ("values", lambda t: t[:63], "wrong length"),
        ("values", lambda t: t[:0], "wrong length"),
        ("values", lambda t: t.double(), "values in float32, bfloat16 or float16"),
        ("values", lambda t: t.to(torch.int8), "without scales"),
        ("values", lambda t: t[None], "needs values"),
        ("scales", lambda _: torch.ones(9), "with scales"),
        ("scales", lambda _: torch.ones(8), "needs scales"),
    ],
)
def test_what_does_not_fit_together_is_refused(name: str, change: object, message: str, tokens: int) -> None:
    given = parts()
    inputs = given["inputs"]
    assert inputs is not None
    assert callable(change)
    given["inputs"] = inputs[:tokens]
    given[name] = change(given[name])
    with pytest.raises(UsageError, match=message):
        multiply(**given, threads=2)


@needs_library
@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_a_number_of_threads_that_cannot_be(threads: int) -> None:
    with pytest.raises(UsageError, match="thread"):
        multiply(**parts(), threads=threads)


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
    with mock.patch("trim_export.runtimes.native.linear.library", return_value=None):
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
