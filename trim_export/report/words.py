"""The sentences and numbers that every form of a report shares."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["achieved", "in_order", "megabytes", "method_sentence", "recovery_sentence", "structured_sentence"]


def megabytes(count: float) -> str:
    """Bytes as decimal megabytes."""
    return f"{count / 1e6:,.1f} MB"


def in_order(modules: Mapping[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Module entries block by block, whatever order JSON gave them."""
    return sorted(modules.items(), key=lambda item: (item[1]["file"], item[0]))


def achieved(entries: Iterable[dict[str, Any]]) -> float:
    """Share of weights that are pruned over all the matrices that ``entries`` describe."""
    entries = list(entries)
    kept: int = sum(entry["nnz"] for entry in entries)
    weights: int = sum(entry["shape"][0] * entry["shape"][1] for entry in entries)
    return 1 - kept / weights


def method_sentence(manifest: dict[str, Any]) -> str:
    """Scores, budgets, update and calibration text of a run."""
    recipe = manifest["run"]["recipe"]
    layers = recipe["layers"]["name"]
    if "layer_choice" in manifest:
        layers = f"{manifest['layer_choice']['chosen']['name']} (by trial)"
    budgets = f"{recipe['rows']} row budgets, {layers} block budgets, {recipe['counts']} counts"
    if recipe.get("pattern", "none") != "none":
        budgets += f", pattern {recipe['pattern']}"
    text = f"{recipe['samples']} x {recipe['sequence_length']} tokens of {recipe['calibration']}, seed {recipe['seed']}"
    return f"{recipe['score']} scores, {budgets}, weight update: {recipe['update']}; calibrated on {text}"


def structured_sentence(record: dict[str, Any]) -> str:
    """What a structured step removed."""
    removed = record["removed"]
    if "blocks" in removed:
        what = f"decoder blocks {', '.join(map(str, removed['blocks']))}"
    else:
        what = f"{removed['heads']} heads and {removed['channels']} channels of every block"
    return f"{record['method']} removed {what} ({record['share']:.1%} of the parameters)"


def recovery_sentence(recovery: dict[str, Any]) -> str:
    """How kept weights were trained, and what that did to the loss on held-out text."""
    before, after = (
        statistics.mean(loss[when] for loss in recovery["losses"].values()) for when in ("before", "after")
    )
    text = f"{recovery['samples']} x {recovery['sequence_length']} tokens of {recovery['calibration']}"
    return (
        f"{recovery['method']}, {recovery['steps']} steps at {recovery['learning_rate']:g} on {text}, "
        f"seed {recovery['seed']}; {recovery['measure']} {before:.4f} -> {after:.4f}"
    )
