"""The model of the cost against what was published, and against what the packers write."""

from __future__ import annotations

import pytest
import torch

from benchmarks.roofline import FORMATS, GPUS, MODELS, PUBLISHED, decode_bytes, decode_seconds
from trim_export.converters import ENCODINGS, SparseMatrix, nbytes

LLAMA, GAMING = MODELS["Llama-2-7B"], GPUS["RTX 4090"]


@pytest.mark.parametrize(("density", "measured"), PUBLISHED.items())
def test_published_speeds_are_met_within_5_percent(density: float, measured: float) -> None:
    form = FORMATS["dense" if density == 1 else "MACKO"]
    assert 1 / decode_seconds(LLAMA, GAMING, form, density) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("sparsity", "least"), [(0.7, 2.0), (0.8, 2.6)])
def test_predicted_speed_up_of_g8(sparsity: float, least: float) -> None:
    dense = decode_seconds(LLAMA, GAMING, FORMATS["dense"], 1.0)
    assert dense / decode_seconds(LLAMA, GAMING, FORMATS["g8"], 1 - sparsity) >= least


@pytest.mark.parametrize("name", ["g8", "csr-interleaved"])
@pytest.mark.parametrize("density", [0.1, 0.2, 0.3, 0.5])
def test_predicted_bytes_are_those_that_are_packed(name: str, density: float) -> None:
    mask = torch.rand(128, 4096, generator=torch.Generator().manual_seed(0)) < density
    matrix = SparseMatrix(mask, torch.ones(int(mask.sum()), dtype=torch.float16))
    form = FORMATS[name]
    predicted = mask.numel() * form.slots(density, 4096) * form.slot_bytes
    assert nbytes(ENCODINGS[name].encode(matrix)) == pytest.approx(predicted, rel=0.04)


def test_the_dense_model_is_read_once() -> None:
    assert decode_bytes(LLAMA, FORMATS["dense"], 1.0) == pytest.approx(13.2e9, rel=0.01)
