"""How sparse each decoder block, or each matrix in it, becomes; the mean over all weights is the target."""

from collections.abc import Callable

from trim_export.layer_budgets.alpha import AlphaPruning, hill_alpha
from trim_export.layer_budgets.auto import Auto, split_sequences
from trim_export.layer_budgets.budget import LayerBudget
from trim_export.layer_budgets.centring import centred, recentre
from trim_export.layer_budgets.dlp import Dlp
from trim_export.layer_budgets.lsa import Lsa, LsaProjection, least_error
from trim_export.layer_budgets.owl import Owl
from trim_export.layer_budgets.uniform import Uniform

__all__ = [
    "LAYER_BUDGETS",
    "AlphaPruning",
    "Auto",
    "Dlp",
    "LayerBudget",
    "Lsa",
    "LsaProjection",
    "Owl",
    "Uniform",
    "centred",
    "hill_alpha",
    "least_error",
    "recentre",
    "split_sequences",
]

LAYER_BUDGETS: dict[str, Callable[..., LayerBudget | Auto]] = {
    "uniform": Uniform,
    "owl": Owl,
    "alpha": AlphaPruning,
    "dlp": Dlp,
    "lsa": Lsa,
    "lsa-projection": LsaProjection,
    "auto": Auto,
}
