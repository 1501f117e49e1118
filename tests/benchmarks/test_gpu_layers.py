"""What the GPU benchmark makes of measurements, and that without a GPU it ends with one sentence."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.gpu_layers import best_choice
from trim_export.runtimes.triton.tuning import Choice


def row(tokens: int, contestant: str, time: float) -> dict[str, Any]:
    return {"tokens": tokens, "contestant": contestant, "median_us": time}


def test_the_best_choice_counts_all_layers_together() -> None:
    rows = [
        *(row(1, "spmv, 1 waves", time) for time in (9, 1)),
        *(row(1, "spmv, 4 waves", time) for time in (4, 4)),
        *(row(tokens, "spmm", 2 * tokens) for tokens in (2, 4, 8, 16)),
        *(row(tokens, "expand", 10) for tokens in (2, 4, 8, 16)),
    ]
    assert best_choice(rows, Choice(8)) == Choice(gathered_tokens=4, waves=4)
    assert best_choice([], Choice(8, 2)) == Choice(8, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so() -> None:
    ended = subprocess.run([sys.executable, "-m", "benchmarks.gpu_layers"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines() == [
        "this benchmark needs the runtime triton: no CUDA device here; "
        "use --runtime torch-sparse or native with --device cpu"
    ]
