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

__all__ = ["Auto", "split_sequences"]

LEAST_SEQUENCES = 4
"""For each of the two uses; fewer would say more about the text than about the budgets."""

TRIAL_SEQUENCES = 32


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


def split_sequences(sequences: int) -> tuple[int, int]:
    """How many calibration sequences trials are pruned on, the first quarter, and judged on, the last eighth.

    Raises:
        UsageError: too few for both.
    """
    if sequences < 2 * LEAST_SEQUENCES:
        raise UsageError(
            f"--layers auto needs {2 * LEAST_SEQUENCES} calibration sequences or more, half of them to judge by, "
            f"not {sequences}; raise --samples, lower --context-length or name a layer budget"
        )
    return min(TRIAL_SEQUENCES, max(LEAST_SEQUENCES, sequences // 4)), max(LEAST_SEQUENCES, sequences // 8)
