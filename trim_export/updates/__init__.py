"""What the kept weights of one matrix become; some methods also choose anew which weights those are."""

from trim_export.updates.admm import Admm
from trim_export.updates.fista import Fista
from trim_export.updates.problem import LayerProblem, Support, Update, WeightUpdate
from trim_export.updates.refit import Refit, masked_cg
from trim_export.updates.sparsegpt import SparseGpt
from trim_export.updates.unchanged import Unchanged

__all__ = [
    "UPDATES",
    "Admm",
    "Fista",
    "LayerProblem",
    "Refit",
    "SparseGpt",
    "Support",
    "Unchanged",
    "Update",
    "WeightUpdate",
    "masked_cg",
]

ADMM_10 = Admm(iterations=10, selections=8, polish=4, name="admm-10")

UPDATES: dict[str, WeightUpdate] = {
    update.name: update for update in (Unchanged(), Refit(), SparseGpt(), Admm(), ADMM_10, Fista())
}
