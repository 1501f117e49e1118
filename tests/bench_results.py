"""What `bench` would have written of four contestants."""

from __future__ import annotations

from typing import Any

__all__ = ["BENCH", "bench_row"]


def bench_row(runtime: str, dtype: str, phase: str, speed: float, memory: int = 4_000_000) -> dict[str, Any]:
    return {
        "runtime": runtime, "dtype": dtype, "phase": phase, "batch": 1, "tokens": 32, "median_ms": 1000 / speed,
        "tokens_per_s": speed, "weight_bytes": memory, "peak_memory_bytes": 2 * memory,
    }  # fmt: skip


BENCH: dict[str, Any] = {
    "machine": {"cpu": "X", "instructions": "AVX2", "device": "cpu", "threads": 2, "torch": "2", "repeats": 5},
    "rows": [
        *(bench_row("dense", "float32", phase, 10.0, 8_000_000) for phase in ("decode", "prefill")),
        *(bench_row("dense", "bfloat16", phase, 16.0) for phase in ("decode", "prefill")),
        bench_row("a", "float32", "decode", 5.0),
        bench_row("a", "float32", "prefill", 50.0),
        bench_row("b", "float32", "decode", 20.0, 2_000_000),
        bench_row("b", "float32", "prefill", 8.0, 2_000_000),
    ],
}
