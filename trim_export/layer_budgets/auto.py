"""The budget that is chosen by trial (`trim_export.auto_budget`), as it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from trim_export.errors import UsageError
from trim_export.layer_budgets.alpha import AlphaPruning
from trim_export.layer_budgets.budget import LayerBudget
from trim_export.layer_budgets.dlp import Dlp
from trim_export.layer_budgets.lsa import Lsa, LsaProjection
from trim_export.layer_budgets.owl import Owl
from trim_export.layer_budgets.uniform import Uniform

__all__ = ["Auto", "split_windows"]

LEAST_WINDOWS = 4
"""For each of the two uses; fewer would say more about the text than about the budgets."""

TRIAL_WINDOWS = 32


@dataclass(frozen=True)
class Auto:
    """Try budgets, take the one whose pruned model stays closest to the dense one, and uniform if none is closer.

    Attributes:
        alternatives: what is tried beside uniform, in this order.
    """

    alternatives: tuple[LayerBudget, ...] = (Owl(), AlphaPruning(), Dlp(), Lsa(), LsaProjection())
    name: str = "auto"

    @property
    def candidates(self) -> tuple[LayerBudget, ...]:
        """All that is tried, uniform first."""
        return (Uniform(), *self.alternatives)

    @property
    def needs_inputs(self) -> bool:
        """Whether measuring for one of them takes a pass of the calibration windows through the dense model."""
        return any(budget.needs_inputs for budget in self.alternatives)


def split_windows(windows: int) -> tuple[int, int]:
    """How many calibration windows trials are pruned on, the first ones, and judged on, the last eighth.

    Raises:
        UsageError: too few for both.
    """
    held_out = max(LEAST_WINDOWS, windows // 8)
    trial = min(TRIAL_WINDOWS, windows - held_out)
    if trial < LEAST_WINDOWS:
        raise UsageError(
            f"--layers auto needs {2 * LEAST_WINDOWS} calibration windows or more, half of them to judge by, "
            f"not {windows}; raise --samples or name a layer budget"
        )
    return trial, held_out
