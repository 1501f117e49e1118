"""Times the kernels against each other on one GPU, and finds what `tuning.Choice` suits it.

Times are those of a CUDA graph's replays, with the L2 cache flushed before each; contestants go round in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trim_export.cuda import record
from trim_export.errors import UsageError
from trim_export.progress import Track, silently
from trim_export.runtimes.triton.launch import FEW, Packed, by_expanding, by_gathering, by_gathering_few, splits
from trim_export.runtimes.triton.tuning import Choice

__all__ = ["SPMM", "SPMV", "Product", "Timer", "best_choice", "gpu_times", "products", "tune"]

TOKENS = (1, 2, 4, 8, 16)
ROUNDS = 20
EXPAND, SPMM = "expand", "spmm"
SPMV = {f"spmv, {waves} waves": waves for waves in (1, 2, 4)}
"""Contestants with one token, and how often they fill the GPU."""
_FLUSHED_BYTES = 256 * 2**20

Product = Callable[[], Tensor]
"""Multiplies fixed weights with fixed inputs."""
Timer = Callable[[Mapping[str, Product]], Mapping[str, Sequence[float]]]
"""Gives the times of products, in any one unit, by their names."""


def tune(layers: Sequence[Packed], timer: Timer, track: Track[Any] = silently) -> Choice:
    """Measure every layer of a model with random inputs of 1 to `FEW` tokens.

    Raises:
        UsageError: there are no layers.
    """
    if not layers:
        raise UsageError("no matrix of this artifact is sparse enough for the Triton kernels: nothing to tune")
    timings = []
    for packed in track(layers, "timing layers"):
        for tokens in TOKENS:
            inputs = packed.values.new_empty(tokens, packed.columns).normal_()
            for name, times in timer(products(packed, inputs)).items():
                timings.append((tokens, name, statistics.median(times)))
    return best_choice(timings)


def products(packed: Packed, inputs: Tensor) -> dict[str, Product]:
    """What `launch.multiply` chooses from for inputs ``[tokens, columns]``, by name."""
    found: dict[str, Product] = {EXPAND: lambda: by_expanding(packed, inputs)}
    if inputs.shape[0] == 1:
        for name, waves in SPMV.items():
            parts = splits(packed, inputs.device, Choice(1, waves))
            found[name] = lambda parts=parts: by_gathering(packed, inputs, parts)  # type: ignore[misc]
    elif inputs.shape[0] <= FEW:
        found[SPMM] = lambda: by_gathering_few(packed, inputs)
    return found


def best_choice(timings: Iterable[tuple[int, str, float]]) -> Choice:
    """What measurements (tokens, name, time) recommend: the waves of the least time, and up to where spmm wins.

    Over all layers together, since the table has one entry for a GPU. Other names do not count.
    """
    totals: dict[tuple[int, str], float] = {}
    for tokens, name, time in timings:
        totals[tokens, name] = totals.get((tokens, name), 0.0) + time
    gathered = 1
    for tokens in sorted(tokens for tokens, name in totals if name == SPMM):
        if totals[tokens, SPMM] > totals[tokens, EXPAND]:
            break
        gathered = tokens
    return Choice(gathered, SPMV[min(SPMV, key=lambda name: totals[1, name])])


def gpu_times(entries: Mapping[str, Product], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each product in each of `ROUNDS` rounds: a `Timer` once the device is bound."""
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
    # Itself where a library does not let itself be recorded.
    runs = {name: record(product) or product for name, product in entries.items()}
    times: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return times
