"""Layers that stand side by side in a block and get the same inputs: multiplied in one call.

One call of one tall matrix costs less than several of small ones, and gives threads enough to do. The model's own code
still asks its layers one after the other: the first to be asked multiplies for all, the others find their part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.converters import SparseMatrix
from trim_export.runtimes.linear import SparseLinear, siblings
from trim_export.runtimes.native.library import is_traced
from trim_export.runtimes.native.linear import NativeLinear, NativeWeights, WaitingLinear

__all__ = ["FusedLinear", "fuse"]


class _Shared(nn.Module):
    """The stacked weights of siblings, and the products that some of them have not fetched yet.

    What is kept belongs to inputs of equal values, so that nobody ever gets a product of other inputs: neither when a
    sibling is called alone nor when inputs were changed in place.
    """

    def __init__(self, matrices: list[SparseMatrix], values: torch.dtype | None) -> None:
        super().__init__()
        self.rows = [matrix.shape[0] for matrix in matrices]
        stacked = SparseMatrix(torch.cat([m.mask for m in matrices]), torch.cat([m.values for m in matrices]))
        self.weights = NativeWeights.of(stacked, values)
        self._pending: tuple[Tensor | None, dict[int, Tensor]] = (None, {})

    def product(self, sibling: int, inputs: Tensor) -> Tensor:
        """The sibling's rows times ``inputs``; from several threads at once too."""
        if is_traced(inputs):  # a compiler sees that all siblings ask for the same product
            traced: Tensor = self.weights(inputs).split(self.rows, dim=-1)[sibling]
            return traced
        known, waiting = self._pending
        if known is not None and known.dtype == inputs.dtype and known.equal(inputs):
            found = waiting.pop(sibling, None)
            if not waiting:
                self._pending = (None, {})
            if found is not None:
                return found
        products: tuple[Tensor, ...] = self.weights(inputs).split(self.rows, dim=-1)
        others = {other: product for other, product in enumerate(products) if other != sibling}
        self._pending = (inputs.detach().clone(), others)
        return products[sibling]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Shared:
        self._pending = (None, {})
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": (None, {})}


class FusedLinear(SparseLinear):
    """One of several layers with the same inputs."""

    def __init__(self, original: WaitingLinear, shared: _Shared, sibling: int) -> None:
        super().__init__((original.out_features, original.in_features), original.bias, original.layout)
        self.bias = original.bias
        self.shared = shared
        self.sibling = sibling

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in the dtype of the inputs."""
        output = self.shared.product(self.sibling, inputs)
        return output if self.bias is None else output + self.bias

    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit."""
        whole = self.shared.weights.ready.matrix()
        first = sum(self.shared.rows[: self.sibling])
        before = int(whole.mask[:first].sum())
        mask = whole.mask[first : first + self.out_features]
        return SparseMatrix(mask, whole.values[before : before + int(mask.sum())])


def fuse(module: nn.Module) -> None:
    """Lay out the siblings within a module that have all been read: as one product if they have values of one dtype."""
    for parent, layers in siblings(module, SparseLinear):  # type: ignore[type-abstract]  # only compared with
        waiting = {name: layer for name, layer in layers.items() if isinstance(layer, WaitingLinear)}
        matrices = [layer.matrix() for layer in waiting.values()]
        if len(waiting) == len(layers) and len({(m.shape[1], m.values.dtype) for m in matrices}) == 1:
            shared = _Shared(matrices, next(iter(waiting.values())).layout.values)
            made: Iterable[nn.Module] = (FusedLinear(layer, shared, i) for i, layer in enumerate(waiting.values()))
        else:
            made = (NativeLinear(layer.matrix(), layer.bias, layer.layout) for layer in waiting.values())
        for name, layer in zip(waiting, made, strict=True):
            setattr(parent, name, layer)
