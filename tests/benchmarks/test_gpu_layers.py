"""Without a GPU the GPU benchmark ends with one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so() -> None:
    ended = subprocess.run([sys.executable, "-m", "benchmarks.gpu_layers"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines() == [
        "this benchmark needs the runtime triton: no CUDA device here; "
        "use --runtime torch-sparse or native with --device cpu"
    ]
