"""The least-squares problem that every weight update works on, its support, and its answer.

With X the inputs that the pruned layer will see and Y the outputs it should give,

    f(V) = |V X - Y|^2 - |Y|^2 = tr(V G V^T) - 2 tr(V B^T),      G = X X^T,      B = Y X^T.

Only G and B are kept, so the cost does not depend on the number of tokens. B = W G asks for the dense layer's own
outputs on these inputs, B = W X_dense X^T for those on the dense model's inputs; no update depends on which.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from trim_export.errors import ModelError
from trim_export.updates.factor import cholesky, equilibrate

__all__ = ["LayerProblem", "Support", "Update", "WeightUpdate"]

LOSS_RIDGE = 1e-7


@dataclass(frozen=True)
class LayerProblem:
    """One matrix to prune; nothing in here is ever changed in place.

    Attributes:
        weight: float32 ``[rows, columns]``, dense.
        gram: float32 ``[columns, columns]``, the sum of x x^T over all tokens; symmetric.
        target: float32 ``[rows, columns]``, the sum of y x^T over all tokens.

    Raises:
        ModelError: one of them is not finite.
    """

    weight: Tensor
    gram: Tensor
    target: Tensor

    def __post_init__(self) -> None:
        rows, columns = self.weight.shape
        if self.gram.shape != (columns, columns) or self.target.shape != (rows, columns):
            shapes = [tuple(tensor.shape) for tensor in (self.weight, self.gram, self.target)]
            raise ValueError(f"weight, Gram matrix and target do not fit together: {shapes}")
        for name, tensor in (("weight", self.weight), ("Gram matrix", self.gram), ("target", self.target)):
            if not bool(tensor.isfinite().all()):
                raise ModelError(f"the layer's {name} is not finite: there is NaN or infinity in it")

    def loss(self, weight: Tensor) -> float:
        """Relative error of a weight: ``(f(V) - f*) / (f(0) - f*)``, f* being the least f of any dense weight.

        0 is the best that a dense layer could do on these inputs, 1 what a layer of zeros does. When B = W G it is
        |(V - W) X|^2 / |W X|^2. Computed in float64; f* is found with a ridge of 1e-7 of each input's power (more
        where G is singular), so values below about 1e-6 mean nothing. A problem that wants nothing (f* = 0) has error
        0 for weights that give nothing, else infinity. Costs columns^3 / 3 once, then rows * columns^2.
        """
        exact = weight.double()
        value = float(((exact @ self.gram.double() - 2 * self.target.double()) * exact).sum())
        if self._least < 0:
            return 1 - value / self._least
        return 0.0 if value <= 0 else float("inf")

    @cached_property
    def _least(self) -> float:
        """f* = -tr(B G^-1 B^T)."""
        gram, inverse_norms = equilibrate(self.gram.double())
        factor, _ = cholesky(gram, LOSS_RIDGE)
        whitened = torch.linalg.solve_triangular(factor, (self.target.double() * inverse_norms).T, upper=False)
        return -float(whitened.square().sum())


@dataclass(frozen=True)
class Support:
    """How many weights are kept, and which, before any update.

    Attributes:
        mask: bool ``[rows, columns]``, what scores and row budgets chose.
        by_row: True if every row keeps ``mask.sum(1)`` weights; False if only the matrix's total is fixed.
    """

    mask: Tensor
    by_row: bool

    @property
    def keep(self) -> Tensor:
        """The budget of each group of weights that compete with each other: int64 ``[rows]``, or ``[1]``."""
        return self.mask.sum(dim=1) if self.by_row else self.mask.sum()[None]

    def grouped(self, values: Tensor) -> Tensor:
        """View values ``[rows, columns]`` with one line for each group, as in `keep`."""
        return values if self.by_row else values.reshape(1, -1)


@dataclass(frozen=True)
class Update:
    """The pruned and updated weight.

    Attributes:
        weight: float32 ``[rows, columns]``, zero outside the mask.
        mask: bool ``[rows, columns]`` with exactly the budget of the support.
    """

    weight: Tensor
    mask: Tensor


class WeightUpdate(Protocol):
    """A frozen dataclass of parameters that is called with a problem and a support."""

    @property
    def name(self) -> str:
        """The word a user types for it."""
        ...

    def __call__(self, problem: LayerProblem, support: Support) -> Update:
        """Choose the kept weights' values, and which they are if the method does that too."""
        ...
