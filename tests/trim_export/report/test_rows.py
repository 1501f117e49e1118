"""Row sparsities and their concentration, as a report shows them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trim_export.artifact import Artifact
from trim_export.report.rows import gini, matrix_rows


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_gini_is_half_the_relative_mean_absolute_difference(counts: list[int]) -> None:
    values = np.array(counts, dtype=np.float64)
    total = np.abs(values[:, None] - values[None]).sum()
    expected = total / (2 * len(values) * values.sum()) if values.sum() else 0.0
    assert gini(np.array(counts)) == pytest.approx(expected, abs=1e-12)


def test_rows_of_an_artifact_are_those_of_its_manifest(pruned: Callable[[str], Artifact]) -> None:
    artifact = pruned("llama")
    matrices = matrix_rows(artifact)
    assert {matrix.name for matrix in matrices} == set(artifact.modules)
    for matrix in matrices:
        described = matrix.entry["row_sparsity"]
        assert matrix.sparsities[0] == pytest.approx(described["min"])
        assert matrix.sparsities[-1] == pytest.approx(described["max"])
        assert matrix.sparsities.mean() == pytest.approx(1 - matrix.entry["nnz"] / np.prod(matrix.entry["shape"]))
        assert matrix.name == f"model.layers.{matrix.block}.{matrix.projection}"
