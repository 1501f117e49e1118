"""What every layer budget is: a measurement of the dense model's parts, and a rule from measurements to sparsities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from trim_export.statistics import InputStatistics

__all__ = ["LayerBudget"]


class LayerBudget(Protocol):
    """A frozen dataclass of parameters with the two steps as methods.

    A part is what gets one sparsity: a decoder block, or a single matrix of it. Every part is measured on its own (one
    number, so nothing large is kept), then all are allocated together.

    Attributes:
        needs_grams: whether measuring takes the Gram matrices of the inputs, beside what ``needs_inputs`` says.
        by_projection: whether a part is a matrix instead of a block.
    """

    needs_grams: ClassVar[bool] = False
    by_projection: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The word a user types for it."""
        ...

    @property
    def needs_inputs(self) -> bool:
        """Whether measuring takes a pass of the calibration windows through the dense model."""
        ...

    def measure(self, weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics]) -> float:
        """Measure one dense part.

        Args:
            weights: its matrices, float32 ``[rows, columns]``.
            inputs: of each of them, if ``needs_inputs``; with Gram matrices if ``needs_grams``.
        """
        ...

    def allocate(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """Sparsity of each part from all measures; ``sizes`` are the parts' numbers of weights."""
        ...
