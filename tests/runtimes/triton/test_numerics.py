"""The kernels against float64: interpreted on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("cases.py")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run_cases(device: str, **environment: str) -> dict[str, float]:
    # A process of its own, because Triton decides at import whether it interprets.
    ended = subprocess.run(
        [sys.executable, str(CASES), device],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    errors: dict[str, float] = json.loads(ended.stdout)
    assert len(errors) == 3 * 2 * 2 * 6
    return errors


def assert_small(errors: dict[str, float]) -> None:
    assert {case: error for case, error in errors.items() if not error <= 1e-5} == {}


@needs_triton
def test_interpreted() -> None:
    assert_small(run_cases("cpu", TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device() -> None:
    assert_small(run_cases("cuda", TRITON_INTERPRET="0"))
