"""Without a GPU the GPU benchmark ends with one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_plot import plot


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so() -> None:
    ended = subprocess.run([sys.executable, "-m", "benchmarks.gpu_layers"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines() == [
        "this benchmark needs the runtime triton: no CUDA device here; "
        "use --runtime torch-sparse or native with --device cpu"
    ]


def test_the_plot_has_a_line_for_each_rival_of_cublas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"contestant": name, "tokens": tokens, "sparsity": sparsity, "ratio_to_cublas": speed * sparsity}
        for name, speed in (("cublas", 1.0), ("spmv", 2.0), ("expand", 0.5))
        for tokens in (1, 16)
        for sparsity in (0.5, 0.8)
    ]
    said = plot(rows, {"gpu": "a card", "torch": "2.13"}, tmp_path / "plot.svg")
    assert said == f"Plot in {tmp_path / 'plot.svg'}."
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(words in drawn for words in ("a card", "spmv", "expand", "1 token<", "16 tokens<"))
    assert "cublas" not in drawn
