"""The store: one JSON file of finished cells under one protocol, a line for each, replaced whole at every addition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import Cell, Protocol, Row, recipe_settings
from trim_export.errors import UsageError
from trim_export.recipe import Recipe, first_difference
from trim_export.storage import read_json, write_bytes

__all__ = ["Record", "Store", "open_store"]

Record = dict[str, Any]
"""A finished cell: ``recipe`` (None: the dense model) and what was measured, or the sentence under ``failed``."""


@dataclass(frozen=True)
class Store:
    """A file of records. It is read anew at every use, so that two runs may fill it side by side.

    Attributes:
        path: of the file; absent until the first cell is finished.
        protocol: that all its cells share.
    """

    path: Path
    protocol: Protocol

    @property
    def records(self) -> list[Record]:
        """All finished cells, in the order in which they were finished."""
        records: list[Record] = read_json(self.path)["cells"] if self.path.exists() else []
        return records

    def find(self, cell: Cell) -> Record | None:
        """The record of a cell, if it holds every stored form that the cell asks for; failures count as records."""
        settings = recipe_settings(cell, self.protocol)
        for record in self.records:
            if same_recipe(record["recipe"], settings):
                complete = "failed" in record or set(cell.stored) <= record.get("stored", {}).keys()
                return record if complete else None
        return None

    def add(self, record: Record) -> None:
        """Write a record down at once, in the place of an earlier one of the same cell."""
        others = [other for other in self.records if not same_recipe(other["recipe"], record["recipe"])]
        write_bytes(self.path, _serialised(self.protocol, [*others, record]))

    def of_row(self, row: Row) -> dict[float, dict[int, Record]]:
        """The records of a row: sparsity -> seed -> record, both ascending; none if the row is not installed."""
        try:
            wanted = recipe_settings(Cell(row, 0.5, 0), self.protocol)
        except UsageError:
            return {}
        found: dict[float, dict[int, Record]] = {}
        for record in self.records:
            recipe = record["recipe"]
            if recipe and wanted and same_recipe(recipe | {"sparsity": 0.5, "seed": 0}, wanted):
                found.setdefault(recipe["sparsity"], {})[recipe["seed"]] = record
        return {sparsity: dict(sorted(seeds.items())) for sparsity, seeds in sorted(found.items())}


def open_store(path: Path, protocol: Protocol | None) -> Store:
    """The store in ``path``, new if there is none.

    Args:
        path: of the JSON file.
        protocol: that it must have; None takes what is there.

    Raises:
        UsageError: it was measured under another protocol; or there is none and no protocol for a new one.
        ArtifactError: not readable as JSON.
    """
    if not path.exists():
        if protocol is None:
            raise UsageError(f"{path}: no results yet; measure with --calibration FILE --data FILE")
        return Store(path, protocol)
    stored = read_json(path)["protocol"]
    difference = None if protocol is None else first_difference(asdict(protocol), stored)
    if difference:
        raise UsageError(f"{path} was measured under another protocol: {difference}; give another --store")
    return Store(path, Protocol(**stored))


def same_recipe(recorded: Record | None, wanted: Record | None) -> bool:
    """Whether a record is of the wanted recipe; a setting that is newer than the record counts as its default there."""
    if recorded is None or wanted is None:
        return recorded is wanted
    return bool(Recipe(0.0).as_json() | recorded == wanted)


def _serialised(protocol: Protocol, records: Sequence[Record]) -> bytes:
    """One line for each record, so that a diff shows which cells are new."""
    lines = ",\n".join(json.dumps(record, sort_keys=True, allow_nan=False) for record in records)
    return f'{{"protocol": {json.dumps(asdict(protocol))},\n"cells": [\n{lines}\n]}}\n'.encode()
