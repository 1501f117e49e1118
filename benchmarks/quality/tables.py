"""What the store says, as tables: recipes, and pruning beside quantisation."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table

from benchmarks.quality.cells import BEST, DENSE, TABLE, Cell
from benchmarks.quality.store import Record, Store
from benchmarks.quality.stored import GGUF
from trim_export.report import megabytes, table

__all__ = ["Contestant", "beaten_by", "contestants", "tables", "verdict"]

HALVES = ("perplexity", "later_perplexity")


@dataclass(frozen=True)
class Contestant:
    """A model as it would be stored.

    Attributes:
        sparsity: None for the dense model.
        form: name in `benchmarks.quality.stored.FORMS`, or `GGUF`.
        matrix_bytes: of the block matrices alone.
        nbytes: of all weights.
        perplexity, later: on the first windows and on the later ones.
    """

    sparsity: float | None
    form: str
    matrix_bytes: int
    nbytes: int
    perplexity: float
    later: float

    def __str__(self) -> str:
        form = "as in its GGUF file" if self.form == GGUF else self.form
        return f"dense, {form}" if self.sparsity is None else f"{self.sparsity:g} sparse, {form}"


def tables(store: Store) -> Iterator[Table | str]:
    """All tables that have something in them, then what failed, then who wins against whom."""
    dense = store.find(Cell(DENSE))
    if dense is None:
        return
    yield _recipe_table(store, dense)
    stored = contestants(store)
    if stored:
        yield _frontier_table(store, stored, dense)
        yield verdict(stored)
    yield from _failures(store)


def contestants(store: Store) -> list[Contestant]:
    """Everything that was measured as stored bytes, smallest first."""
    records: list[tuple[float | None, Record | None]] = [(None, store.find(Cell(DENSE)))]
    for sparsity, seeds in store.of_row(BEST).items():
        records.append((sparsity, next((record for record in seeds.values() if "stored" in record), None)))
    found = [
        Contestant(sparsity, form, as_stored["matrix_bytes"], as_stored["bytes"], *(as_stored[half] for half in HALVES))
        for sparsity, record in records
        if record
        for form, as_stored in record.get("stored", {}).items()
    ]
    return sorted(found, key=lambda contestant: (contestant.nbytes, contestant.perplexity))


def beaten_by(contestant: Contestant, field: list[Contestant]) -> Contestant | None:
    """The best of the other kind (dense against pruned) that is no larger, and better on both halves of the text."""
    better = [
        rival
        for rival in field
        if (rival.sparsity is None) != (contestant.sparsity is None)
        and rival.nbytes <= contestant.nbytes
        and rival.perplexity < contestant.perplexity
        and rival.later < contestant.later
    ]
    return min(better, key=lambda rival: rival.perplexity, default=None)


def verdict(field: list[Contestant]) -> str:
    """In sentences: where quantisation alone wins, where pruning does, and what neither side beats."""
    beaten = {contestant: beaten_by(contestant, field) for contestant in field}

    def named(pruned: bool) -> str:
        pairs = [(c, by) for c, by in beaten.items() if by and (c.sparsity is not None) == pruned]
        return "; ".join(f"{contestant} (by {by})" for contestant, by in pairs) or "none"

    unbeaten = "; ".join(str(contestant) for contestant, by in beaten.items() if by is None)
    own_file = "\nThe dense weights were read from a GGUF file: they lie on its grid already, before any form here."
    return (
        f"Pruned, but a quantised dense model is no larger and better: {named(True)}.\n"
        f"Quantised, but a pruned model is no larger and better: {named(False)}.\n"
        f"Beaten by nothing of the other kind: {unbeaten or 'none'}."
        + (own_file if any(contestant.form == GGUF for contestant in field) else "")
    )


def _recipe_table(store: Store, dense: Record) -> Table:
    about = store.protocol
    rows: list[tuple[object, ...]] = []
    for row in TABLE:
        for sparsity, seeds in store.of_row(row).items():
            done = _done(seeds)
            first, later = (_seed_and_mean(done, half, dense[half]) for half in HALVES)
            rows.append(
                (
                    row.name,
                    f"{sparsity:g}",
                    *first,
                    *later,
                    _over(done, "sparsity", "{:.4f}"),
                    _over(done, "prune_seconds", "{:.0f}"),
                    _over(done, "peak_memory_bytes", "{:,.0f}", 1e-6),
                    _count(seeds),
                )
            )
    rows.append((DENSE.name, "0", *_dense_cells(dense["perplexity"]), *_dense_cells(dense["later_perplexity"])))
    return table(
        f"{about.model}: perplexity on windows 0-{about.windows - 1} and {about.windows}-{2 * about.windows - 1} of "
        f"{about.window} tokens of {about.data}, calibrated on {about.samples} x {about.length} tokens of "
        f"{about.calibration}; means over n seeds",
        (
            "recipe", "sparsity", "seed 0", "mean", "x dense", "later: seed 0", "mean", "x dense", "realised",
            "prune s", "peak MB", "n",
        ),
        [(*row, *("-",) * (12 - len(row))) for row in rows],
    )  # fmt: skip


def _frontier_table(store: Store, field: list[Contestant], dense: Record) -> Table:
    weights = next((c.matrix_bytes / 2 for c in field if c.sparsity is None and c.form == "bf16"), None)
    return table(
        f"{store.protocol.model}: perplexity against stored bytes (embeddings, head and norms in bf16 for all)",
        ("stored", "bytes", "MB", "bits/weight", "perplexity", "x dense", "later", "x dense", "beaten by"),
        [
            (
                str(c),
                f"{c.nbytes:,}",
                megabytes(c.nbytes),
                f"{8 * c.matrix_bytes / weights:.2f}" if weights else None,
                f"{c.perplexity:.2f}",
                f"{c.perplexity / dense['perplexity']:.2f}",
                f"{c.later:.2f}",
                f"{c.later / dense['later_perplexity']:.2f}",
                beaten_by(c, field),
            )
            for c in field
        ],
    )


def _failures(store: Store) -> Iterator[str]:
    """A sentence for each failed cell, under the first of its rows' names."""
    told: list[Record] = []
    for row in TABLE:
        for sparsity, seeds in store.of_row(row).items():
            for seed, record in seeds.items():
                if "failed" in record and record not in told:
                    told.append(record)
                    yield f"Failed: {Cell(row, sparsity, seed)}: {record['failed']}"


def _done(seeds: Mapping[int, Record]) -> dict[int, Record]:
    return {seed: record for seed, record in seeds.items() if "failed" not in record}


def _count(seeds: Mapping[int, Record]) -> str:
    failed = len(seeds) - len(_done(seeds))
    return f"{len(seeds) - failed} + {failed} failed" if failed else str(len(seeds))


def _seed_and_mean(seeds: Mapping[int, Record], half: str, dense: float) -> tuple[str, str, str]:
    first = f"{seeds[0][half]:.2f}" if 0 in seeds else "-"
    if not seeds:
        return first, "-", "-"
    mean = statistics.mean(record[half] for record in seeds.values())
    return first, f"{mean:.2f}", f"{mean / dense:.2f}"


def _dense_cells(value: float) -> tuple[str, str, str]:
    return f"{value:.2f}", f"{value:.2f}", "1.00"


def _over(
    seeds: Mapping[int, Record],
    key: str,
    layout: str,
    unit: float = 1.0,
) -> str:
    values = [record[key] * unit for record in seeds.values()]
    return layout.format(statistics.mean(values)) if values else "-"
