"""CUDA beyond tensors: work that is recorded as a graph, and what the driver says of a card."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

__all__ = ["WARM_UPS", "Recorder", "driver_facts", "record"]

WARM_UPS = 3
"""Times that work is done before it is recorded: that compiles kernels and fills the libraries' workspaces."""

Recorder = Callable[[Callable[[], object]], Callable[[], object] | None]
"""Does work a few times and gives what does it again; None where the work does not let itself be recorded."""


def record(work: Callable[[], object]) -> Callable[[], object] | None:
    """Do ``work`` `WARM_UPS` times, then record it as a CUDA graph, which does not do it: a `Recorder`.

    Replays run without Python between the kernels, in the memory that the work had when it was recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def driver_facts(device: torch.device) -> dict[str, str]:
    """Driver version, clocks and power limit of an NVIDIA card as ``nvidia-smi`` prints them; empty without it."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(query.split(","), said, strict=False))
