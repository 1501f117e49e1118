"""What tuning makes of times; the times themselves are made up, since only a GPU has true ones."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trim_export.errors import UsageError
from trim_export.runtimes.triton.timing import EXPAND, SPMM, best_choice, tune
from trim_export.runtimes.triton.tuning import Choice


def test_the_best_choice_counts_all_layers_together() -> None:
    timings = [
        *((1, "spmv, 1 waves", time) for time in (9.0, 1.0)),
        *((1, "spmv, 2 waves", time) for time in (1.0, 99.0)),
        *((1, "spmv, 4 waves", time) for time in (4.0, 4.0)),
        *((tokens, SPMM, 2.0 * tokens) for tokens in (2, 4, 8, 16)),
        *((tokens, EXPAND, 10.0) for tokens in (1, 2, 4, 8, 16, 512)),
        (1, "cublas", 0.1),
    ]
    assert best_choice(timings) == Choice(gathered_tokens=4, waves=4)


@pytest.mark.parametrize(("expand", "gathered"), [(1.0, 1), (2.0, 2), (100.0, 16)])
def test_the_break_even_lies_between_one_token_and_the_most(expand: float, gathered: int) -> None:
    timings = [
        *((1, f"spmv, {waves} waves", float(waves)) for waves in (1, 2, 4)),
        *((tokens, SPMM, float(tokens)) for tokens in (2, 4, 8, 16)),
        *((tokens, EXPAND, expand) for tokens in (1, 2, 4, 8, 16)),
    ]
    assert best_choice(timings) == Choice(gathered, waves=1)


def test_a_model_without_sparse_layers_cannot_be_tuned() -> None:
    with pytest.raises(UsageError, match="nothing to tune"):
        tune([], lambda entries: pytest.fail("nothing should be timed"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_tuning_times_kernels_that_compute_the_same() -> None:
    # A process of its own, because Triton decides at import whether it interprets.
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tuned.py"))],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    result = json.loads(ended.stdout)
    assert result["choice"] == {"gathered_tokens": 4, "waves": 2}
    assert result["worst"] < 1e-5
