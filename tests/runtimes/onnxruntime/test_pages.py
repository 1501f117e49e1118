"""Weights of several sessions lie in the same chunks of memory: none may overwrite, lose or keep what is another's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx_graphs import constants, needs_operators, run, write_operator

from trim_export.converters import SparseMatrix
from trim_export.converters.onnx.operators import SPARSE
from trim_export.runtimes.onnxruntime import Session, open_session

pytestmark = needs_operators

OPERATOR = SPARSE["csr"]


def written(folder: Path, shape: tuple[int, int], density: float, seed: int) -> NDArray[np.float64]:
    """A model of one product; returns its matrix."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    matrix = SparseMatrix(mask, torch.randn(int(mask.sum()), generator=generator))
    write_operator(folder, OPERATOR, shape, constants(OPERATOR, matrix, "float32"), function=False)
    return matrix.to_dense().double().numpy()


def check(session: Session, matrix: NDArray[np.float64]) -> None:
    """Whether a session still multiplies by its matrix, one token and several."""
    for tokens in (1, 7):
        inputs = np.random.default_rng(tokens).standard_normal((tokens, matrix.shape[1]), np.float32)
        np.testing.assert_allclose(run(session, inputs), inputs @ matrix.T, rtol=1e-4, atol=1e-4)


def test_a_session_keeps_its_weights_when_others_come_and_go(tmp_path: Path) -> None:
    shapes = [(40, 300), (8, 4000), (333, 65), (1, 9)]
    matrices = [written(tmp_path / str(i), shape, 0.3, i) for i, shape in enumerate(shapes)]
    sessions: list[Session | None] = [open_session(tmp_path / str(i), threads=1) for i in range(len(shapes))]
    for gone in range(len(shapes)):
        sessions[gone] = None
        again = open_session(tmp_path / str(gone), threads=1)
        for session, matrix in zip(sessions, matrices, strict=True):
            if session:
                check(session, matrix)
        check(again, matrices[gone])
        sessions[gone] = again if gone % 2 else None


def test_sessions_can_be_opened_at_the_same_time(tmp_path: Path) -> None:
    matrices = [written(tmp_path / str(i), (200 + i, 500), 0.3, i) for i in range(8)]
    with ThreadPoolExecutor(4) as threads:
        folders = [tmp_path / str(i) for i in range(len(matrices))] * 3
        sessions: Sequence[Session] = list(threads.map(lambda folder: open_session(folder, threads=1), folders))
    for session, matrix in zip(sessions, matrices * 3, strict=True):
        check(session, matrix)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shape", [(300, 8000), (1200, 8000)], ids=["in a chunk", "larger than half of one"])
def test_weights_go_when_their_session_goes(shape: tuple[int, int], tmp_path: Path) -> None:
    matrix = written(tmp_path / "one", shape, 0.5, 0)
    check(open_session(tmp_path / "one", threads=1), matrix)
    before = resident()
    for _ in range(4):
        open_session(tmp_path / "one", threads=1)
    assert resident() - before < 2 * 4 * int((matrix != 0).sum())


def resident() -> int:
    """Bytes of memory that this process has written to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
