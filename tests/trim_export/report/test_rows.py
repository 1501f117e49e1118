"""Row sparsities and their concentration, as a report shows them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from trim_export.artifact import Artifact, open_artifact
from trim_export.convert import convert
from trim_export.errors import ArtifactError
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


def test_counted_bits_are_the_decoded_rows(pruned: Callable[[str], Artifact], tmp_path: Path) -> None:
    artifact = pruned("llama")
    convert(artifact, "csr", tmp_path / "csr")
    other = open_artifact(tmp_path / "csr")
    for name, entry in artifact.modules.items():
        expected = artifact.matrix(name, entry).mask.numpy().sum(axis=1)
        for one in (artifact, other):
            assert one.row_counts(name, one.modules[name]).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda mask: np.zeros_like(mask), r"holds 0 weights, the manifest says \d+"),
        (lambda mask: mask[:-1].copy(), r"weight_mask is not the mask of \d+ x \d+ weights"),
        (lambda mask: mask.astype(np.int16), r"weight_mask is not the mask of \d+ x \d+ weights"),
        (None, r"does not contain tensor"),
    ],
)
def test_a_damaged_mask_is_named(
    damage: Callable[[np.ndarray], np.ndarray] | None,
    reason: str,
    pruned: Callable[[str], Artifact],
    tmp_path: Path,
) -> None:
    shutil.copytree(pruned("llama").path, tmp_path / "a")
    artifact = open_artifact(tmp_path / "a")
    name, entry = next(iter(artifact.modules.items()))
    file = tmp_path / "a" / entry["file"]
    tensors = load_file(file)
    mask = tensors.pop(f"{name}.weight_mask")
    save_file(tensors if damage is None else tensors | {f"{name}.weight_mask": damage(mask)}, file)
    with pytest.raises(ArtifactError, match=f"{re.escape(str(file))}: {name}: .*{reason}"):
        artifact.row_counts(name, entry)


def test_looking_at_an_artifact_imports_no_torch(pruned: Callable[[str], Artifact], tmp_path: Path) -> None:
    """Importing it takes longer than everything that `inspect` does."""
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    program = """
import runpy, sys
sys.argv = ["trim-export", "inspect", sys.argv[1], "--html", sys.argv[2]]
try:
    runpy.run_module("trim_export", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", program, str(pruned("llama").path), str(tmp_path / "report.html")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000
