"""What every sparse layer can do besides multiply: say what it holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from trim_export.converters import SparseMatrix

__all__ = ["Layout", "Runtime", "SparseLinear", "have_siblings", "siblings", "tensor_bytes"]

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names under which decoders keep layers that read the same input, in the order in which they call them."""

L = TypeVar("L", bound=nn.Module)


@dataclass(frozen=True)
class Layout:
    """Where and in what arrangement a layer shall be built.

    Attributes:
        device: that it executes on.
        block: block size when the artifact stores blocks, else None.
        siblings: whether layers with the same input follow or stand already, for `Runtime.finish` to join it with.
        values: dtype to hold kept weights in; None for the one they have.
    """

    device: torch.device
    block: tuple[int, int] | None = None
    siblings: bool = False
    values: torch.dtype | None = None


class SparseLinear(nn.Module, ABC):
    """``y = x W^T + b`` with a sparse W; takes the place of an `nn.Linear`.

    Attributes:
        in_features, out_features: columns and rows of W.
        bias: ``[out_features]`` or None.
        block: block size when the artifact stores blocks, else None.
    """

    def __init__(self, shape: tuple[int, int], bias: Tensor | None, layout: Layout) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(layout.device), requires_grad=False)
        self.block = layout.block

    @abstractmethod
    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit, on the CPU."""

    def extra_repr(self) -> str:
        """Shape, as `nn.Linear` prints it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Runtime(Protocol):
    """A way to execute sparse layers."""

    @property
    def name(self) -> str:
        """The word a user types for it."""
        ...

    @property
    def devices(self) -> tuple[str, ...]:
        """Types of torch devices that it executes on."""
        ...

    def unavailable(self) -> str | None:
        """Why it cannot be used on this machine, as a sentence; None when it can."""
        ...

    def linear(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> nn.Module:
        """A layer that executes ``matrix``, which came out of a decoder and is therefore valid."""
        ...

    def finish(self, module: nn.Module) -> None:
        """What takes more than one layer, such as joining those that share their input; nothing is done twice.

        Called with the parent of each layer as soon as the layer stands, so that little is held double, and with the
        whole model at the end.
        """
        ...


def have_siblings(parent: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a child stands beside all that read the same input, and they are of these kinds."""
    return any(
        name in names and all(isinstance(getattr(parent, other, None), kinds) for other in names) for names in SIBLINGS
    )


def siblings(module: nn.Module, kind: type[L]) -> Iterator[tuple[nn.Module, dict[str, L]]]:
    """Each parent of layers with the same input, and those layers by name, where all of them are of one kind."""
    # Parents only: what a sibling held is to be freed when it is replaced, not when all are.
    for parent in [part for part in module.modules() if any(hasattr(part, names[0]) for names in SIBLINGS)]:
        for names in SIBLINGS:
            found = {name: layer for name in names if isinstance(layer := getattr(parent, name, None), kind)}
            if len(found) == len(names):
                yield parent, found


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers of a module: what its weights occupy in memory."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()]}
    return sum(tensors.values())
