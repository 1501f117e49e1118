"""What `bench` refuses to measure, since the figures would mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from trim_export.bench import Contestant, Workload, bench
from trim_export.errors import UsageError


def test_contestants_whose_idle_threads_never_sleep_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    entries = [Contestant(tmp_path / "missing", runtime, "float32") for runtime in ("dense", "native")]
    with pytest.raises(UsageError, match="OMP_WAIT_POLICY=ACTIVE"):
        bench(entries, Workload())
