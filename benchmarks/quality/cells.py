"""What is measured, declared as data: rows, and the cells that they give at some sparsity and calibration seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from trim_export.calibration import source_name
from trim_export.errors import UsageError, choose
from trim_export.layer_budgets import LAYER_BUDGETS
from trim_export.recipe import RECIPES, Recipe, make_recipe
from trim_export.storage import sha256_file

__all__ = [
    "BEST",
    "DENSE",
    "SUITES",
    "TABLE",
    "Cell",
    "Protocol",
    "Row",
    "Sources",
    "declare",
    "recipe_of",
    "recipe_settings",
]


@dataclass(frozen=True)
class Sources:
    """Where model and texts are on this machine; what a store says of them is in `Protocol`.

    Attributes:
        model: as for `trim_export.models.load_model`.
        calibration: text file that pruning sees.
        data: text file that perplexity is measured on.
    """

    model: str
    calibration: str
    data: str


@dataclass(frozen=True)
class Protocol:
    """What all cells of a store have in common; figures of different protocols are never compared.

    Attributes:
        model, calibration, data: names of the sources, without their directories.
        calibration_sha256, data_sha256: of the two files.
        samples, length: calibration windows and tokens of each.
        windows, window: evaluation windows and tokens of each. Perplexity is measured on the first ``windows`` and,
            apart, on as many later ones: text that nobody looked at while choosing.
        device: ``cpu`` or ``cuda``.
    """

    model: str
    calibration: str
    calibration_sha256: str
    data: str
    data_sha256: str
    samples: int = 128
    length: int = 128
    windows: int = 8
    window: int = 1024
    device: str = "cpu"

    @classmethod
    def of(cls, sources: Sources, device: str = "cpu") -> Protocol:
        """The protocol at its full size.

        Raises:
            UsageError: one of the texts is not a file.
        """
        for text in (sources.calibration, sources.data):
            if not Path(text).is_file():
                raise UsageError(f"{text}: no such text file")
        return cls(
            source_name(sources.model),
            source_name(sources.calibration),
            sha256_file(Path(sources.calibration)),
            source_name(sources.data),
            sha256_file(Path(sources.data)),
            device=device,
        )


@dataclass(frozen=True)
class Row:
    """One line of a table, for any sparsity and seed.

    Attributes:
        name: what ``--only`` calls it.
        recipe: name in `RECIPES`; None for the dense model.
        overrides: settings that differ from the recipe's; a block budget by its name, with its default parameters.
    """

    name: str
    recipe: str | None
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        row: what is done.
        sparsity, seed: at which target and with which calibration draw; None for the dense model.
        stored: in which forms its numbers are stored and measured besides (`benchmarks.quality.stored`).
    """

    row: Row
    sparsity: float | None = None
    seed: int | None = None
    stored: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.row.name if self.seed is None else f"{self.row.name} at {self.sparsity:g}, seed {self.seed}"


DENSE = Row("dense", None)
BEST = Row("best", "best")

TABLE = (
    Row("wanda", "paper", {"rows": "uniform"}),
    Row("trim", "paper"),
    Row("fast", "fast"),
    BEST,
)
"""The recipes, and Wanda as the papers run it."""

SPARSE_FORMS = ("bf16", "int8")
DENSE_FORMS = ("bf16", "int8", "int4", "int3")

SUITES = ("table", "frontier")
SPARSITIES = (0.5, 0.6, 0.7, 0.8)


def declare(
    protocol: Protocol,
    suites: Sequence[str],
    seeds: Sequence[int],
    sparsities: Sequence[float] | None = None,
    only: Sequence[str] | None = None,
    file_forms: tuple[str, ...] = (),
) -> tuple[list[Cell], list[str]]:
    """The cells of some suites, each once: the dense model, then all cells of the first seed, of the second, ...

    Args:
        protocol: of the store.
        suites: names in `SUITES`.
        seeds: of the calibration draws; the frontier takes the first alone.
        sparsities: instead of `SPARSITIES`.
        only: names of rows; the dense model is always there, since everything is compared with it.
        file_forms: further forms of the dense model, which depend on the file it comes from.

    Returns:
        The cells, and a note for each row that this installation cannot prune.

    Raises:
        UsageError: ``only`` names a row that no suite has.
    """
    known = {row.name: row for row in (DENSE, *(row for suite in suites for row in _rows(suite)))}
    for name in only or ():
        choose("row", name, known)
    cells: dict[str, Cell] = {}
    notes: dict[str, None] = {}
    for cell in _all_cells(suites, seeds, sparsities, file_forms):
        if cell.row is not DENSE and only and cell.row.name not in only:
            continue
        try:
            settings = json.dumps(recipe_settings(cell, protocol), sort_keys=True)
        except UsageError as error:
            notes[f"{cell.row.name} skipped: {error}"] = None
            continue
        same = cells.get(settings, cell)
        cells[settings] = replace(same, stored=tuple(dict.fromkeys(same.stored + cell.stored)))
    return list(cells.values()), list(notes)


def recipe_of(cell: Cell, protocol: Protocol) -> Recipe:
    """The recipe of a cell that prunes.

    Raises:
        UsageError: a name or a setting that is not installed here, or a sparsity that cannot be.
    """
    given: dict[str, Any] = dict(cell.row.overrides)
    missing = given.keys() - {setting.name for setting in fields(Recipe)}
    if missing:
        raise UsageError(f"recipes have no setting {min(missing)!r}")
    if "layers" in given:
        given["layers"] = choose("layer budget", given["layers"], LAYER_BUDGETS)()
    assert cell.row.recipe is not None
    assert cell.sparsity is not None
    return make_recipe(
        cell.row.recipe,
        cell.sparsity,
        **given,
        calibration=protocol.calibration,
        samples=min(protocol.samples, RECIPES[cell.row.recipe].get("samples", protocol.samples)),
        sequence_length=protocol.length,
        seed=cell.seed,
    )


def recipe_settings(cell: Cell, protocol: Protocol) -> dict[str, Any] | None:
    """The recipe of a cell as plain JSON, which is what identifies the cell; None for the dense model."""
    if cell.row.recipe is None:
        return None
    settings: dict[str, Any] = json.loads(json.dumps(recipe_of(cell, protocol).as_json()))
    return settings


def _rows(suite: str) -> tuple[Row, ...]:
    return {"table": TABLE, "frontier": (BEST,)}[suite]


def _all_cells(
    suites: Iterable[str],
    seeds: Sequence[int],
    sparsities: Sequence[float] | None,
    file_forms: tuple[str, ...],
) -> Iterator[Cell]:
    frontier = "frontier" in suites
    yield Cell(DENSE, stored=DENSE_FORMS + file_forms if frontier else ())
    for number, seed in enumerate(seeds):
        for suite in suites:
            if suite == "frontier" and number > 0:
                continue
            for sparsity in sparsities or SPARSITIES:
                for row in _rows(suite):
                    yield Cell(row, sparsity, seed, SPARSE_FORMS if suite == "frontier" else ())
