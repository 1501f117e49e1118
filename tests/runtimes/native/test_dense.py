"""Dense layers beside the pruned ones: single tokens through our kernel, 8-bit heads and embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_layers import available, needs_library
from torch import Tensor, nn

from trim_export.converters.int8 import quantize_weight
from trim_export.errors import UsageError
from trim_export.runtimes.native.dense import (
    DenseLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    multiply_dense,
)
from trim_export.runtimes.native.library import select_isa

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize_weight(weight) if dtype == torch.int8 else (weight.to(dtype), None)


@needs_library
@pytest.mark.parametrize("name", available())
@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from([1, 7, 8, 16, 31, 32, 33, 64, 100, 259]),
    dtype=st.sampled_from([*FLOATS, torch.int8]),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
def test_a_token_agrees_with_float64(
    name: str, rows: int, columns: int, dtype: torch.dtype, threads: int, seed: int
) -> None:
    select_isa(name)
    weight, scales = random_weight(rows, columns, dtype, seed)
    inputs = torch.randn(columns, generator=torch.Generator().manual_seed(seed + 1))
    exact = weight.double() if scales is None else weight.double() * scales.double()[:, None]
    output = multiply_dense(inputs, weight, scales, threads)
    select_isa(None)
    assert ((output - exact @ inputs.double()).abs() <= 1e-6 * (exact.abs() @ inputs.abs().double()) + 1e-30).all()


@needs_library
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    weight, scales = random_weight(9001, 70, dtype)
    inputs = torch.randn(70)
    alone = multiply_dense(inputs, weight, scales, 1)
    for threads in (2, 3, 64):
        assert torch.equal(multiply_dense(inputs, weight, scales, threads), alone)


@needs_library
@pytest.mark.parametrize(
    ("inputs", "weight", "scales", "message"),
    [
        (torch.ones(5), torch.ones(3, 4), None, "inputs or outputs"),
        (torch.ones(4).double(), torch.ones(3, 4), None, "cannot multiply"),
        (torch.ones(4), torch.ones(3, 4).double(), None, "cannot multiply"),
        (torch.ones(4), torch.ones(12), None, "cannot multiply"),
        (torch.ones(4), torch.ones(4, 3).T, None, "without gaps"),
        (torch.ones(4), torch.ones(3, 4, device="meta"), None, "on the CPU"),
        (torch.ones(4), torch.ones(3, 4), torch.ones(2), "wrong length"),
        (torch.ones(4), torch.ones(3, 4, dtype=torch.int8), None, "wrong length"),
        (torch.ones(4), torch.ones(3, 4, dtype=torch.int8), torch.ones(2), "wrong length"),
        (torch.ones(4), torch.ones(3, 4, dtype=torch.int8), torch.ones(3).double(), "scales"),
        (torch.ones(4), torch.ones(0, 4), None, "no rows"),
    ],
)
def test_what_does_not_fit_is_refused(inputs: Tensor, weight: Tensor, scales: Tensor | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        multiply_dense(inputs, weight, scales, 1)


@needs_library
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_layer_stands_for_a_linear(dtype: torch.dtype, bias: bool) -> None:
    original = nn.Linear(70, 9, bias=bias, dtype=dtype)
    made = DenseLinear(original)
    assert made.weight is original.weight
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    for shape in ((70,), (1, 70), (1, 1, 70), (3, 70), (0, 70)):
        inputs = torch.randn(shape).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(made(inputs), original(inputs), **tolerance)


def test_a_dense_layer_has_its_gradients() -> None:
    original = nn.Linear(70, 9)
    inputs = torch.randn(1, 70)
    DenseLinear(original)(inputs).sum().backward()
    assert original.weight.grad is not None
    assert torch.equal(original.weight.grad, inputs.expand(9, 70))


@needs_library
@pytest.mark.parametrize("dtype", FLOATS)
def test_eight_bits_round_to_half_a_step(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 70).to(dtype)
    weight[3] = 0
    steps, scales = quantize_weight(weight)
    back = steps.double() * scales.double()[:, None]
    assert ((back - weight.double()).abs() <= 0.5001 * scales.double()[:, None]).all()
    head = QuantizedLinear(steps, scales, None).to(dtype)
    for shape in ((70,), (1, 1, 70), (2, 3, 70)):
        inputs = torch.randn(shape).to(dtype)
        expected = inputs.double() @ (steps.double() * head.scales.double()[:, None]).T
        torch.testing.assert_close(head(inputs).double(), expected, rtol=0.02, atol=0.02)
    table = QuantizedEmbedding(steps, scales, dtype)
    tokens = torch.tensor([[0, 3, 8], [8, 1, 1]])
    torch.testing.assert_close(table(tokens), back[tokens].to(dtype))


@needs_library
def test_a_copied_head_is_independent() -> None:
    head = QuantizedLinear(*quantize_weight(torch.randn(9, 70)), None)
    inputs = torch.randn(1, 70)
    expected, twin = head(inputs), copy.deepcopy(head)
    head.weight.zero_()
    assert torch.equal(twin(inputs), expected)
