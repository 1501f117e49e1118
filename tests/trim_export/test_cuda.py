"""What the driver says, from an nvidia-smi that is not one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trim_export.cuda import driver_facts

DEVICE = torch.device("cuda", 1)


def test_driver_and_clocks_are_what_nvidia_smi_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("""#!/bin/sh
case "$*" in *--id=1*) echo '550.54, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W' ;; *) exit 6 ;; esac
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = driver_facts(DEVICE)
    assert facts["driver_version"] == "550.54"
    assert facts["clocks.max.mem"] == "2619 MHz"
    assert facts["power.limit"] == "700.00 W"
    assert driver_facts(torch.device("cuda", 0)) == {}


def test_without_nvidia_smi_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_facts(DEVICE) == {}
