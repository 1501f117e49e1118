"""What a structured pruning method is."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from trim_export.forward import Compute
from trim_export.models import DenseModel
from trim_export.progress import Track

__all__ = ["StructuredMethod"]


class StructuredMethod(Protocol):
    """A frozen dataclass of parameters that removes a share of a model's parameters in place."""

    @property
    def name(self) -> str:
        """The word a user types for it."""
        ...

    def __call__(
        self, dense: DenseModel, tokens: Tensor, share: float, seed: int, compute: Compute, track: Track[Any]
    ) -> dict[str, Any]:
        """Remove about ``share`` of all parameters and adjust the configuration.

        Args:
            dense: changed in place.
            tokens: calibration windows, int64 ``[windows, tokens]``.
            share: of the parameters, tied ones counted once.
            seed: of whatever is drawn.
            compute: where and in which arithmetic the passes run.
            track: shows progress.

        Returns:
            What was removed, as JSON.

        Raises:
            UsageError: more than can be removed; the model is as it was.
        """
        ...
