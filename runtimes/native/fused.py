"""Layers that stand side by side in a block and get the same inputs: multiplied in one call.

One call of one tall matrix costs less than several of small ones, and gives threads enough to do. The model's own code
still asks its layers one after the other: the first to be asked multiplies for all, the others find their part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.converters import SparseMatrix
from trim_export.runtimes.linear import Layout, SparseLinear, siblings
from trim_export.runtimes.native.library import is_traced
from trim_export.runtimes.native.linear import NativeLinear, NativeWeights

__all__ = ["FusedLinear", "fuse"]


class _Shared(nn.Module):
    """The stacked weights of siblings, and the products that some of them have not fetched yet.

    What is kept belongs to inputs of equal values, so that nobody ever gets a product of other inputs: neither when a
    sibling is called alone nor when inputs were changed in place.
    """

    def __init__(self, matrices: list[SparseMatrix], to_int8: bool) -> None:
        super().__init__()
        self.rows = [matrix.shape[0] for matrix in matrices]
        stacked = SparseMatrix(torch.cat([m.mask for m in matrices]), torch.cat([m.values for m in matrices]))
        self.weights = NativeWeights.of(stacked, to_int8)
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

    def __init__(self, original: NativeLinear, shared: _Shared, sibling: int) -> None:
        layout = Layout(torch.device("cpu"), original.block)
        super().__init__((original.out_features, original.in_features), original.bias, layout)
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


def fuse(model: nn.Module) -> None:
    """Make siblings of a model one product, where all of them are native and have values of one dtype."""
    for parent, layers in siblings(model, NativeLinear):
        if len({(layer.in_features, layer.weights.values.dtype) for layer in layers.values()}) > 1:
            continue
        shared = _Shared([layer.matrix() for layer in layers.values()], any(layer.to_int8 for layer in layers.values()))
        for sibling, (name, layer) in enumerate(layers.items()):
            setattr(parent, name, FusedLinear(layer, shared, sibling))
