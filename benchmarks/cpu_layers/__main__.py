"""Time single linear layers: ours against torch dense and CSR, scipy, and onnxruntime where it is installed.

python -m benchmarks.cpu_layers [--model Llama-2-7B] [--sparsity 0.8] [--tokens 1 128] [--json FILE]
                                [--deepsparse PYTHON]

All contestants take turns, in another order each round, so that a machine whose speed drifts and what the one before
leaves in the caches treat all alike. A turn is a few products one after the other, as in a model, each with the next of
as many copies of the weights as no cache holds; the first ones, which wake the threads, do not count, and before each
turn the threads of the one before get the time to go to sleep. Medians and minima of all that counts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.cpu_layers.contestants import CONTESTANTS, Contestant, share_threads
from benchmarks.cpu_layers.deepsparse import DeepSparse
from benchmarks.cpu_layers.plot import plot
from benchmarks.cpu_layers.shapes import SHAPES, Shape, random_matrix
from trim_export.bench import Workload, machine
from trim_export.converters import SparseMatrix
from trim_export.report import table
from trim_export.runtimes.native.library import isa

COLD_BYTES = 64e6  # weights of one contestant, all copies together: more than the last cache holds
MOST_COPIES = 24
WAKING, COUNTED = 2, 3  # products of a turn
PAUSE_S = 0.1


def main() -> None:
    """Measure, print a table for each shape and sparsity, and write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["SmolLM2-135M", "Llama-2-7B"], help="all, or names of models")
    parser.add_argument("--shape", nargs="+", help="only these, as rows x columns: 4096x4096")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--deepsparse", type=Path, help="an interpreter that has deepsparse: it needs numpy 1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    share_threads(options.threads)
    known = {shape.model for shape in SHAPES}
    models = known if options.model == ["all"] else set(options.model)
    if models - known:
        parser.error(f"--model knows {', '.join(sorted(known))}")
    about = machine(Workload(repeats=options.rounds)) | {
        "isa": isa(),
        "threads": options.threads,
        "read_gb_per_s": read_bandwidth(),
        "left_out": [contestant.name for contestant in CONTESTANTS if not contestant.is_here()],
    }
    console = Console()
    console.print(f"reads at {about['read_gb_per_s']:.1f} GB/s, {options.threads} threads, {about['isa']}")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        if shape.model not in models or (options.shape and f"{shape.rows}x{shape.columns}" not in options.shape):
            continue
        for sparsity in options.sparsity:
            found = measure(shape, sparsity, options.tokens, options.threads, options.rounds, options.deepsparse)
            rows += found
            for tokens in options.tokens:
                console.print(report(shape, sparsity, tokens, [row for row in found if row["tokens"] == tokens]))
            if options.json:  # after each layer: a run can be stopped
                options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    if options.json:
        console.print(plot(rows, about, options.json.with_suffix(".svg")))


@dataclass(frozen=True)
class _Entry:
    """A contestant with a matrix: a turn gives the milliseconds of its products; ``nbytes`` of weights, if known."""

    turn: Callable[[Tensor, int], Sequence[float]]
    nbytes: int | None


def _entry(contestant: Contestant, matrix: SparseMatrix) -> _Entry:
    first = contestant.make(matrix, None)
    more = min(max(int(COLD_BYTES / first.nbytes), 1), MOST_COPIES)
    copies = [first, *(contestant.make(matrix, None) for _ in range(more))]

    def turn(inputs: Tensor, products: int) -> list[float]:
        spent = []
        for _ in range(products):
            copies.append(copies.pop(0))
            begin = time.perf_counter()
            copies[-1].multiply(inputs)
            spent.append((time.perf_counter() - begin) * 1e3)
        return spent

    return _Entry(turn, first.nbytes)


@torch.inference_mode()
def measure(
    shape: Shape, sparsity: float, tokens: Sequence[int], threads: int, rounds: int, deepsparse: Path | None = None
) -> list[dict[str, Any]]:
    """Rows of one matrix: each contestant at each number of tokens."""
    matrix = random_matrix(shape, sparsity)
    with ExitStack() as stack:
        entries = {c.name: _entry(c, matrix) for c in CONTESTANTS if c.is_here()}
        if deepsparse:
            copies = int(COLD_BYTES / (4 * matrix.nnz)) + 1
            worker = stack.enter_context(DeepSparse(deepsparse, matrix.to_dense().numpy(), copies, threads))
            entries["deepsparse float32"] = _Entry(lambda x, products: worker.turn(len(x), products), None)
        return [
            row
            for count in tokens
            for row in _rows(entries, matrix, asdict(shape) | {"sparsity": sparsity}, count, rounds)
        ]


def _rows(
    entries: dict[str, _Entry], matrix: SparseMatrix, about: dict[str, Any], tokens: int, rounds: int
) -> list[dict[str, Any]]:
    (rows, columns), shuffled = matrix.shape, random.Random(0)
    inputs = torch.randn(tokens, columns)
    times: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(rounds if tokens < 16 else max(rounds // 3, 3)):
        for name in shuffled.sample(list(entries), len(entries)):
            time.sleep(PAUSE_S)
            times[name] += entries[name].turn(inputs, WAKING + COUNTED)[WAKING:]
    base = {name: statistics.median(spent) for name, spent in times.items()}
    size = {name: entry.nbytes for name, entry in entries.items()}
    return [
        {
            **about,
            "achieved_sparsity": 1 - matrix.nnz / (rows * columns),
            "tokens": tokens,
            "contestant": name,
            "median_ms": base[name],
            "min_ms": min(spent),
            "bytes_per_weight": None if (known := size[name]) is None else known / (rows * columns),
            "gb_per_s": None if known is None else known / base[name] / 1e6,
            "times_float32": base["torch dense float32"] / base[name],
            "times_bfloat16": base["torch dense bfloat16"] / base[name],
        }
        for name, spent in times.items()
    ]


def read_bandwidth(megabytes: int = 512) -> float:
    """GB/s at which all threads together read memory that no cache holds; the best of five passes."""
    numbers = torch.ones(megabytes * 250_000)
    spans = []
    for _ in range(5):
        begin = time.perf_counter()
        numbers.sum()
        spans.append(time.perf_counter() - begin)
    return megabytes / 1e3 / min(spans)


def report(shape: Shape, sparsity: float, tokens: int, rows: list[dict[str, Any]]) -> Any:
    """The rows of one measurement as a table."""
    return table(
        f"{shape.model} {shape.rows} x {shape.columns}, sparsity {sparsity}, {tokens} tokens",
        ("contestant", "median ms", "min ms", "x float32", "x bfloat16", "bytes a weight"),
        [
            (
                row["contestant"],
                f"{row['median_ms']:.3f}",
                f"{row['min_ms']:.3f}",
                f"{row['times_float32']:.2f}",
                f"{row['times_bfloat16']:.2f}",
                "" if row["bytes_per_weight"] is None else f"{row['bytes_per_weight']:.3f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
