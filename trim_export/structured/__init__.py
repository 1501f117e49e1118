"""Structured pruning: whole decoder blocks, or channels and heads, leave a smaller dense model that any tool loads."""

from trim_export.structured.baselines import LastBlocks, RandomBlocks
from trim_export.structured.depth import blocks_to_remove, remove_blocks
from trim_export.structured.flap import Flap
from trim_export.structured.method import StructuredMethod
from trim_export.structured.perturbation import perturb
from trim_export.structured.pip import Pip
from trim_export.structured.reduce import RECORD, reduce_model, replay, require_vacant, save_reduced
from trim_export.structured.shortgpt import ShortGpt

__all__ = [
    "RECORD",
    "STRUCTURED",
    "Flap",
    "LastBlocks",
    "Pip",
    "RandomBlocks",
    "ShortGpt",
    "StructuredMethod",
    "blocks_to_remove",
    "perturb",
    "reduce_model",
    "remove_blocks",
    "replay",
    "require_vacant",
    "save_reduced",
]

STRUCTURED: dict[str, StructuredMethod] = {
    method.name: method for method in (Pip(), ShortGpt(), Flap(), LastBlocks(), RandomBlocks())
}
"""Methods by the word a user types; ``last`` and ``random`` are what the others are compared with."""
