"""The curves against their definition in float64: native and portable, every number of pruned weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trim_export.curves as module
from trim_export.curves import Curves, curves, native_available

KERNELS = [
    pytest.param("native", marks=pytest.mark.skipif(not native_available(), reason="installed without the library")),
    "portable",
]


@contextmanager
def only(kernel: str) -> Iterator[None]:
    if kernel == "native":
        yield
        return
    with mock.patch.object(module, "_library", return_value=None):
        yield


def problem(rows: int, columns: int, samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with zeros and ties in their importance, inputs with a dead column."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    weight[torch.rand(rows, columns, generator=draw) < 0.2] = 0.0
    inputs = torch.randn(columns, samples, generator=draw) * 10 ** torch.randn(columns, 1, generator=draw)
    inputs[seed % (columns + 3) % columns] = 0.0
    order = weight.abs().mul(3).round().argsort(dim=1, stable=True)
    return weight, order, inputs


def assert_matches_definition(result: Curves, weight: Tensor, order: Tensor, inputs: Tensor) -> None:
    rows, columns = weight.shape
    weight, inputs = weight.double(), inputs.double()
    target = weight @ inputs
    # Rounding is relative to the terms that are summed, which may cancel.
    scale = (weight.abs() @ inputs.abs()).square().sum(dim=1) + 1e-30
    for pruned in range(columns + 1):
        kept = weight.clone()
        kept.scatter_(1, order[:, :pruned], 0.0)
        output = kept @ inputs
        numerator_error = (result.numerator[:, pruned].double() - (output * target).sum(dim=1)).abs() / scale
        norm2_error = (result.norm2[:, pruned].double() - output.square().sum(dim=1)).abs() / scale
        assert numerator_error.max() < 1e-5
        assert norm2_error.max() < 1e-5
    assert ((result.target_norm2 - target.square().sum(dim=1)).abs() / scale).max() < 1e-5
    assert result.numerator.shape == result.norm2.shape == (rows, columns + 1)
    assert (result.numerator.dtype, result.target_norm2.dtype) == (torch.float32, torch.float64)
    assert not result.numerator[:, columns].any()
    assert not result.norm2[:, columns].any()


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 17), samples=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_curves_equal_their_definition(kernel: str, rows: int, columns: int, samples: int, seed: int) -> None:
    weight, order, inputs = problem(rows, columns, samples, seed)
    with only(kernel):
        result = curves(weight, order, inputs)
    assert_matches_definition(result, weight, order, inputs)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("samples", [1, 127, 2500])
def test_any_number_of_samples(kernel: str, samples: int) -> None:
    weight, order, inputs = problem(20, 33, samples, seed=7)
    with only(kernel):
        result = curves(weight, order, inputs)
    assert_matches_definition(result, weight, order, inputs)


@pytest.mark.skipif(not native_available(), reason="installed without the library")
def test_native_and_portable_agree() -> None:
    weight, order, inputs = problem(64, 200, 128, seed=3)
    native = curves(weight, order, inputs)
    with only("portable"):
        portable = curves(weight, order, inputs)
    scale = float(native.norm2.max())
    torch.testing.assert_close(native.numerator, portable.numerator, rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(native.norm2, portable.norm2, rtol=1e-4, atol=1e-6 * scale)
    assert torch.equal(native.target_norm2, portable.target_norm2)


@pytest.mark.skipif(not native_available(), reason="installed without the library")
def test_native_does_not_depend_on_the_number_of_threads() -> None:
    weight, order, inputs = problem(50, 40, 30, seed=5)
    results = []
    for threads in (1, 3):
        with mock.patch.object(torch, "get_num_threads", return_value=threads):
            results.append(curves(weight, order, inputs))
    assert torch.equal(results[0].numerator, results[1].numerator)
    assert torch.equal(results[0].norm2, results[1].norm2)


@pytest.mark.parametrize("elements", [1, 50, 300, 1000])
def test_portable_gives_the_same_in_blocks_of_any_size(elements: int) -> None:
    weight, order, inputs = problem(7, 25, 11, seed=1)
    with only("portable"), mock.patch.object(module, "_CHUNK_ELEMENTS", elements):
        result = curves(weight, order, inputs)
    assert_matches_definition(result, weight, order, inputs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_views_and_parameters_are_welcome(kernel: str) -> None:
    weight, order, inputs = problem(6, 10, 8, seed=2)
    parameter = torch.nn.Parameter(weight.t().contiguous().t())
    with only(kernel):
        result = curves(parameter, order.t().contiguous().t(), inputs.t().contiguous().t())
    assert not result.numerator.requires_grad
    assert_matches_definition(result, weight, order, inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_curves_on_a_gpu() -> None:
    weight, order, inputs = problem(64, 200, 128, seed=4)
    result = curves(weight.cuda(), order.cuda(), inputs.cuda())
    on_host = Curves(result.numerator.cpu(), result.norm2.cpu(), result.target_norm2.cpu())
    assert_matches_definition(on_host, weight, order, inputs)


WEIGHT, ORDER, INPUTS = problem(3, 4, 5, seed=0)


@pytest.mark.parametrize(
    ("weight", "order", "inputs", "message"),
    [
        pytest.param(WEIGHT[0], ORDER, INPUTS, "needs weight", id="weight-not-a-matrix"),
        pytest.param(WEIGHT, ORDER, INPUTS[:, 0], "needs weight", id="inputs-not-a-matrix"),
        pytest.param(WEIGHT, ORDER[:2], INPUTS, "needs weight", id="order-misses-a-row"),
        pytest.param(WEIGHT, ORDER, INPUTS[:3], "needs weight", id="inputs-miss-a-column"),
        pytest.param(WEIGHT, ORDER, INPUTS[:, :0], "something in each", id="no-samples"),
        pytest.param(WEIGHT[:0], ORDER[:0], INPUTS, "something in each", id="no-rows"),
        pytest.param(WEIGHT[:, :0], ORDER[:, :0], INPUTS[:0], "something in each", id="no-columns"),
        pytest.param(WEIGHT.double(), ORDER, INPUTS, "float32 weight", id="weight-dtype"),
        pytest.param(WEIGHT, ORDER.int(), INPUTS, "int64 order", id="order-dtype"),
        pytest.param(WEIGHT, ORDER, INPUTS.bfloat16(), "float32 inputs", id="inputs-dtype"),
        pytest.param(WEIGHT, ORDER.to("meta"), INPUTS, "one device", id="devices"),
        pytest.param(WEIGHT, ORDER + 1, INPUTS, "names columns 1..4", id="column-too-large"),
        pytest.param(WEIGHT, ORDER - 1, INPUTS, "names columns -1..2", id="column-negative"),
    ],
)
def test_unfitting_arguments_are_refused(weight: Tensor, order: Tensor, inputs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curves(weight, order, inputs)


def test_a_library_that_does_not_load_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "native" / "libtrim_curves.so"
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    monkeypatch.setattr("trim_export.__path__", [str(tmp_path)])
    with pytest.warns(RuntimeWarning, match="does not load"):
        assert module._library.__wrapped__() is None


def test_out_of_memory_halves_the_chunk_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    weight, order, inputs = problem(5, 40, 6, 0)
    whole, tried = module._chunked_curves, []

    def scarce(*arguments: Any) -> tuple[Tensor, Tensor]:
        tried.append(arguments[-1])
        if arguments[-1] > 100:
            raise torch.OutOfMemoryError("too large")
        return whole(*arguments)

    with only("portable"):
        expected = curves(weight, order, inputs)
        with mock.patch.object(module, "_chunked_curves", scarce):
            found = curves(weight, order, inputs)
    for one, other in ((found.numerator, expected.numerator), (found.norm2, expected.norm2)):
        # The same sums in another order.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert tried == [2**24 >> halvings for halvings in range(len(tried))]
    assert tried[-1] <= 100 < tried[-2]
    assert f"cpu is out of memory: trying again with {tried[-1]} values at a time" in caplog.text


def test_out_of_memory_for_a_single_sample_is_passed_on() -> None:
    def never(*arguments: Any) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("too large")

    with (
        only("portable"),
        mock.patch.object(module, "_chunked_curves", never),
        pytest.raises(torch.OutOfMemoryError),
    ):
        curves(*problem(5, 40, 6, 0))
