"""Tables that people read in a terminal, made from manifests and measurements."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from trim_export.report.words import (
    achieved,
    in_order,
    megabytes,
    method_sentence,
    recovery_sentence,
    structured_sentence,
)

__all__ = [
    "bench_table",
    "block_table",
    "choice_sentence",
    "choice_table",
    "facts",
    "module_table",
    "recovery_table",
    "structured_table",
    "summary_table",
    "table",
]


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table whose first column is text and the others are right-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        result.add_row(*("-" if cell is None else str(cell) for cell in row))
    return result


def facts(title: str, rows: Iterable[tuple[str, object]]) -> Table:
    """A table of names and values without column heads."""
    result = Table(
        title=title, title_justify="left", title_style="bold", pad_edge=False, box=box.SIMPLE_HEAD, show_header=False
    )
    for name, value in rows:
        result.add_row(name, str(value))
    return result


def summary_table(manifest: dict[str, Any]) -> Table:
    """What an artifact is and what it saves."""
    sizes, sparsity, removed = manifest["bytes"], manifest["sparsity"], manifest["source"].get("structured")
    return facts(
        "artifact",
        [
            ("source model", f"{manifest['source']['model']} ({manifest['source']['dtype']})"),
            *([("before that", structured_sentence(removed))] if removed else []),
            ("method", method_sentence(manifest)),
            *([("recovery", recovery_sentence(manifest["recovery"]))] if "recovery" in manifest else []),
            ("sparsity", f"{sparsity['achieved']:.5f} (target {sparsity['target']:g})"),
            ("pruned matrices", len(manifest["modules"])),
            ("weight files", f"{megabytes(sizes['artifact'])} of {megabytes(sizes['dense'])} dense"),
            ("size ratio", f"{sizes['artifact'] / sizes['dense']:.3f}"),
        ],
    )


def structured_table(record: dict[str, Any]) -> Table:
    """What structured pruning removed and what is left."""
    return facts(
        "structured pruning",
        [
            ("method", structured_sentence(record)),
            ("weights", f"{megabytes(record['bytes'])} of {megabytes(record['source_bytes'])}"),
        ],
    )


def block_table(manifest: dict[str, Any]) -> Table:
    """One line for each decoder block: sparsities, cosines, learning rates in the order of its projections."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    for _, entry in in_order(manifest["modules"]):
        blocks.setdefault(entry["file"].removesuffix(".safetensors"), []).append(entry)
    return table(
        "pruned blocks (row sparsity over all rows; cosine of outputs, mean of projections: uniform rows -> as pruned)",
        ("block", "target", "achieved", "row min", "median", "max", "cosine", "learning rates"),
        [
            (
                name,
                f"{_target(entries):.4f}",
                f"{achieved(entries):.4f}",
                f"{min(entry['row_sparsity']['min'] for entry in entries):.3f}",
                f"{statistics.median(entry['row_sparsity']['median'] for entry in entries):.3f}",
                f"{max(entry['row_sparsity']['max'] for entry in entries):.3f}",
                f"{statistics.mean(entry['cosine_uniform'] for entry in entries):.4f} -> "
                f"{statistics.mean(entry['cosine'] for entry in entries):.4f}",
                " ".join(_rate(entry["learning_rate"]) for entry in entries),
            )
            for name, entries in blocks.items()
        ],
    )


def choice_sentence(choice: dict[str, Any]) -> str:
    """Which layer budget trials chose, and why."""
    chosen, uniform = choice["chosen"], choice["candidates"][0]
    best = next(result for result in choice["candidates"] if result["budget"] == chosen)
    against = "" if best is uniform else f" against uniform {_nats(uniform['kl'])}"
    sequences = f"{choice['held_out_sequences']} held-out sequences"
    return f"layer budget: {chosen['name']}, KL {_nats(best['kl'])}{against} on {sequences}"


def choice_table(choice: dict[str, Any]) -> Table:
    """How far from the dense model each candidate's trial ended."""
    return table(
        "layer budgets by trial",
        ("candidate", "KL to the dense model"),
        [(_budget(result["budget"]), _nats(result["kl"])) for result in choice["candidates"]],
    )


def module_table(manifest: dict[str, Any]) -> Table:
    """One line for each pruned matrix."""
    return table(
        "pruned matrices",
        ("module", "shape", "target", "achieved", "row min", "median", "max", "cosine", "rate"),
        [
            (
                name,
                "x".join(map(str, entry["shape"])),
                f"{entry['target_sparsity']:.4f}",
                f"{achieved([entry]):.4f}",
                f"{entry['row_sparsity']['min']:.3f}",
                f"{entry['row_sparsity']['median']:.3f}",
                f"{entry['row_sparsity']['max']:.3f}",
                f"{entry['cosine_uniform']:.4f} -> {entry['cosine']:.4f}",
                _rate(entry["learning_rate"]),
            )
            for name, entry in in_order(manifest["modules"])
        ],
    )


def bench_table(result: dict[str, Any]) -> Table:
    """One line for each runtime, phase and batch."""
    about = result["machine"]
    return table(
        f"{about['cpu']} ({about['instructions']}), {about['device']}, {about['threads']} threads, "
        f"torch {about['torch']}; {about['repeats']} interleaved rounds",
        (
            "runtime", "dtype", "phase", "batch", "tokens", "median ms", "min ms", "tokens/s", "x dense",
            "x fastest dense", "weights", "peak memory", "load s",
        ),
        [
            (
                row["runtime"],
                row["dtype"],
                row["phase"],
                row["batch"],
                row["tokens"],
                f"{row['median_ms']:.1f}",
                f"{row['min_ms']:.1f}",
                f"{row['tokens_per_s']:.1f}",
                _ratio(row["ratio_to_dense"]),
                _ratio(row["ratio_to_fastest_dense"]),
                megabytes(row["weight_bytes"]),
                megabytes(row["peak_memory_bytes"]),
                f"{row['load_s']:.1f}",
            )
            for row in result["rows"]
        ],
    )  # fmt: skip


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def recovery_table(manifest: dict[str, Any]) -> Table:
    """One line for each thing that was trained: the loss on the held-out windows, and the step that did best."""
    recovery = manifest["recovery"]
    return table(
        f"recovered ({recovery['measure']}, on the held-out windows)",
        ("trained", "before", "after", "best step"),
        [
            (name.removesuffix(".safetensors"), f"{loss['before']:.5f}", f"{loss['after']:.5f}", loss["step"])
            for name, loss in sorted(recovery["losses"].items())
        ],
    )


def _budget(budget: dict[str, Any]) -> str:
    """A layer budget's name and parameters."""
    parameters = [f"{name} {value:g}" for name, value in budget.items() if type(value) is float]
    return f"{budget['name']} ({', '.join(parameters)})" if parameters else str(budget["name"])


def _nats(divergence: float | None) -> str:
    return "not finite" if divergence is None else f"{divergence:.4g}"


def _target(entries: Sequence[dict[str, Any]]) -> float:
    """Target of several matrices together."""
    sizes = [entry["shape"][0] * entry["shape"][1] for entry in entries]
    pruned = sum(float(entry["target_sparsity"]) * size for entry, size in zip(entries, sizes, strict=True))
    return float(pruned / sum(sizes))


def _rate(learning_rate: float | None) -> str:
    return "-" if learning_rate is None else f"{learning_rate:g}"
