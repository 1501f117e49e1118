"""Everything that decides the bytes of an artifact, as one value that can be written down and compared."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trim_export.errors import UsageError, choose
from trim_export.layer_budgets import LAYER_BUDGETS, Auto, LayerBudget, Owl, Uniform, split_sequences
from trim_export.patterns import Anywhere, NofM, Pattern, parse_pattern
from trim_export.row_budgets import ROW_BUDGETS
from trim_export.scores import SCORES
from trim_export.storage import canonical_json, sha256_bytes
from trim_export.trim import EXACT, PAPER, ROW_CAP, Policy
from trim_export.updates import UPDATES

__all__ = ["RECIPES", "Recipe", "first_difference", "make_recipe"]

POLICIES: dict[str, Policy] = {"exact": EXACT, "paper": PAPER}
TARGETS = ("own", "dense", "residual")
MASK_KEEPING = ("none", "refit")
"""Updates that leave the mask as they get it."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a pruning run.

    Attributes:
        sparsity: share of weights pruned over all blocks, in [0, 1).
        score: name in `SCORES`.
        layers: the layer budget with its parameters, or `Auto` to have one chosen by trial.
        rows: name in `ROW_BUDGETS`.
        update: name in `UPDATES`: what the kept weights become.
        targets: what an updated layer should give: ``own``, the dense layer's outputs on the pruned model's inputs;
            ``dense``, the dense model's outputs there; ``residual``, the same, and layers that write into the residual
            stream also make up for what was lost before.
        counts: ``exact`` (counts sum to the target, never above the cap) or ``paper`` (the authors' code to the bit).
        pattern: where kept weights may lie (`trim_export.patterns`): ``none``, ``N:M`` or ``block:RxC``.
        head: whether the LM head is pruned too.
        calibration: text file, data set or ``self``.
        samples: calibration windows.
        sequence_length: tokens of each window.
        context_length: calibration windows are joined into sequences of up to this many tokens; 0 joins none.
        seed: of the calibration draw.
    """

    sparsity: float
    score: str = "wanda"
    layers: LayerBudget | Auto = field(default_factory=Uniform)
    rows: str = "uniform"
    update: str = "admm"
    targets: str = "residual"
    counts: str = "exact"
    pattern: str = "none"
    head: bool = False
    calibration: str = "self"
    samples: int = 128
    sequence_length: int = 128
    context_length: int = 1024
    seed: int = 0

    @property
    def policy(self) -> Policy:
        """How row sparsities become counts."""
        return POLICIES[self.counts]

    def as_json(self) -> dict[str, Any]:
        """Plain values, as the manifest stores them."""
        values: dict[str, Any] = json.loads(canonical_json(asdict(self)))
        return values


RECIPES: dict[str, dict[str, Any]] = {
    "best": {"layers": Owl(), "rows": "matrix"},
    "fast": {"layers": Owl(), "rows": "matrix", "update": "admm-10", "samples": 16},
    "paper": {"rows": "trim", "update": "none", "counts": "paper", "context_length": 0},
}
"""Named starting points; an option given on the command line replaces the recipe's value."""


def make_recipe(name: str, sparsity: float, **given: Any) -> Recipe:
    """Start from a named recipe, replace what was ``given`` (None means not given), and validate the result.

    Raises:
        UsageError: naming the first value that cannot be.
    """
    wanted = {key: value for key, value in given.items() if value is not None}
    base = choose("recipe", name, RECIPES)
    start = replace(Recipe(sparsity), **base)
    recipe = replace(start, **pattern_defaults(parse_pattern(wanted.get("pattern", "none")), start) | wanted)
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {sparsity} is outside [0, 1)")
    score = choose("score", recipe.score, SCORES)
    choose("layer budget", recipe.layers.name, LAYER_BUDGETS)
    rows = choose("row budget", recipe.rows, ROW_BUDGETS)
    choose("counts", recipe.counts, POLICIES)
    choose("weight update", recipe.update, UPDATES)
    choose("targets", recipe.targets, dict.fromkeys(TARGETS))
    if rows.capped and sparsity > ROW_CAP:
        raise UsageError(f"sparsity {sparsity} is above TRIM's cap of {ROW_CAP} on each row; use --rows uniform")
    if not isinstance(recipe.layers, Uniform) and sparsity > ROW_CAP:
        raise UsageError(
            f"sparsity {sparsity} is above the cap of {ROW_CAP} for layers of different sparsity; use --layers uniform"
        )
    require_consistent(parse_pattern(recipe.pattern), recipe)
    for setting in ("samples", "sequence_length"):
        if getattr(recipe, setting) < 1:
            raise UsageError(f"{setting.replace('_', ' ')} must be at least 1")
    if isinstance(recipe.layers, Auto):
        split_sequences(recipe.samples)
    if rows.needs_problem and recipe.update == "none":
        raise UsageError(f"rows {recipe.rows} needs a weight update; give one with --update, or other --rows")
    if recipe.head and (rows.needs_problem or score.needs_gradients):
        what = f"rows {recipe.rows}" if rows.needs_problem else f"score {recipe.score}"
        raise UsageError(f"{what} is for decoder blocks only; leave out --head, or choose another")
    if score.needs_gradients and recipe.sequence_length < 2:
        raise UsageError(f"score {recipe.score} needs windows of at least 2 tokens: a single one predicts nothing")
    return recipe


def pattern_defaults(pattern: Pattern, recipe: Recipe) -> dict[str, Any]:
    """What a recipe becomes under a pattern unless told otherwise: an update that leaves the mask alone."""
    if isinstance(pattern, Anywhere):
        return {}
    update = recipe.update if recipe.update in MASK_KEEPING else "refit"
    return {"update": update} | ({"rows": "uniform", "layers": Uniform()} if isinstance(pattern, NofM) else {})


def require_consistent(pattern: Pattern, recipe: Recipe) -> None:
    """Stop (`UsageError`) at settings that a pattern leaves no room for."""
    if isinstance(pattern, Anywhere):
        return
    if recipe.update not in MASK_KEEPING:
        raise UsageError(f"update {recipe.update} chooses its own mask; with --pattern use --update refit or none")
    if isinstance(pattern, NofM):
        if abs(recipe.sparsity - pattern.sparsity) > 1e-9:
            raise UsageError(f"pattern {recipe.pattern} has sparsity {pattern.sparsity:g}, not {recipe.sparsity:g}")
        if recipe.rows != "uniform" or not isinstance(recipe.layers, Uniform):
            raise UsageError(
                f"pattern {recipe.pattern} prunes all rows and layers alike; leave out --rows and --layers"
            )


def fingerprint(run: dict[str, Any]) -> str:
    """Short hash of everything that decides the bytes."""
    return sha256_bytes(canonical_json(run))[:16]


def first_difference(mine: Any, theirs: Any, path: str = "") -> str | None:
    """Name the first field in which two JSON values differ, with both values; None when they are equal."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            found = first_difference(mine.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if mine == theirs else f"{path} (there {theirs!r}, here {mine!r})"
