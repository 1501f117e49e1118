"""The layer sweep compares ways to compute the same thing, and writes down what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cpu_layers.contestants import CONTESTANTS, Contestant
from benchmarks.cpu_layers.shapes import SHAPES, Shape, random_matrix
from trim_export.runtimes.native.library import library

SMALL = Shape("small", 48, 96)
TOLERANCE = {"bfloat16": 2e-2, "int8": 2e-2, "8 bits": 3e-2, "4 bits": 0.3}

pytestmark = pytest.mark.skipif(library() is None, reason="installed without the library")


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda contestant: contestant.name)
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_contestant_multiplies_by_the_same_weights(contestant: Contestant, tokens: int) -> None:
    if not contestant.is_here():
        pytest.skip(f"needs {contestant.needs}")
    matrix = random_matrix(SMALL, 0.6)
    inputs = torch.randn(tokens, SMALL.columns, generator=torch.Generator().manual_seed(1))
    found = contestant.make(matrix, 1).multiply(inputs)
    found = torch.as_tensor(found[0] if isinstance(found, list) else found).double()
    expected = inputs.double() @ matrix.to_dense().double().T
    found = found.T if found.shape == expected.T.shape and found.shape != expected.shape else found
    tolerance = next((value for name, value in TOLERANCE.items() if name in contestant.name), 1e-5)
    assert (found.reshape(expected.shape) - expected).norm() <= tolerance * expected.norm()


def test_rows_of_a_random_matrix_differ_and_their_mean_is_right() -> None:
    matrix = random_matrix(Shape("", 400, 300), 0.8)
    density = matrix.row_counts / 300
    assert density.mean() == pytest.approx(0.2, abs=0.01)
    assert density.max() > 2 * density.min()
    assert len({(shape.rows, shape.columns, shape.model) for shape in SHAPES}) == len(SHAPES)


# In a process of its own, since threads that sessions share are those of the whole process from then on.
SMALL_RUN = """
from unittest import mock
from benchmarks.cpu_layers import __main__ as sweep
from benchmarks.cpu_layers.shapes import Shape

with (
    mock.patch.object(sweep, "SHAPES", (Shape("small", 48, 96),)),
    mock.patch.object(sweep, "COLD_BYTES", 1e5),
    mock.patch.object(sweep, "read_bandwidth", return_value=1.0),
):
    sweep.main()
"""


def test_a_run_writes_every_cell(tmp_path: Path) -> None:
    out = tmp_path / "layers.json"
    arguments = f"--model small --sparsity 0.6 --tokens 1 20 --rounds 2 --threads 2 --json {out}".split()
    done = subprocess.run(
        [sys.executable, "-c", SMALL_RUN, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    here = {contestant.name for contestant in CONTESTANTS if contestant.is_here()}
    cells = {(row["contestant"], row["tokens"]) for row in written["rows"]}
    assert cells == {(name, tokens) for name in here for tokens in (1, 20)}
    assert set(written["machine"]["left_out"]) | here == {contestant.name for contestant in CONTESTANTS}
    assert "native bfloat16" in done.stdout
