"""Products in a row multiply by the weights of one, again and again, in every form that is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_graphs import needs_operators

from benchmarks import onnx_layers
from benchmarks.onnx_layers import layers, repeat, write_product
from trim_export.runtimes.onnxruntime import open_session


def test_products_in_a_row_are_a_power_of_the_matrix_and_share_no_bytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((24, 24), np.float32)
    write_product(tmp_path, weight)
    repeat(tmp_path, 3)
    inputs = generator.standard_normal((5, 24), np.float32)
    found = open_session(tmp_path, threads=1).run({"A": inputs})["Y"]
    expected = inputs.astype(np.float64) @ np.linalg.matrix_power(weight.T.astype(np.float64), 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    files = [file for file in tmp_path.iterdir() if file.suffix == ".data"]
    assert [file.stat().st_size for file in files] == [weight.nbytes] * 3


@needs_operators
def test_every_form_is_measured_as_several_copies_and_weighs_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 96
    monkeypatch.setattr(onnx_layers, "SIDE", side)
    monkeypatch.setattr(onnx_layers, "PAUSE_S", 0.0)
    rows = layers(tmp_path, threads=1, rounds=1)
    weights = 4 * side * side
    assert weights <= rows["dense"]["bytes"] < weights + 2000
    assert set(rows) == {place.name for place in tmp_path.iterdir()}
    inputs = np.random.default_rng(1).standard_normal((2, side), np.float32)
    expected = open_session(tmp_path / "dense", threads=1).run({"A": inputs})["Y"]
    for name, row in rows.items():
        assert all(row[str(tokens)]["median_ms"] >= row[str(tokens)]["min_ms"] > 0 for tokens in onnx_layers.TOKENS)
        found = open_session(tmp_path / name, threads=1).run({"A": inputs})["Y"]
        assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected), name
        files = [file.stat().st_size for file in (tmp_path / name).iterdir() if file.suffix == ".data"]
        assert files == [files[0]] * onnx_layers.PRODUCTS, name
        assert files[0] < row["bytes"], name
