"""Layers that the Triton kernels execute, and the runtime that makes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trim_export.converters import G8, InterleavedCsr, SparseMatrix, nbytes
from trim_export.converters._groups import MOST_SLOTS
from trim_export.converters.csr_interleaved import cost
from trim_export.runtimes.linear import Layout, SparseLinear, siblings
from trim_export.runtimes.native.linear import MaskedLinear
from trim_export.runtimes.triton.launch import Packed
from trim_export.runtimes.triton.operators import grouped_linear

__all__ = ["PackedRows", "TritonLinear", "TritonRuntime", "join_siblings"]

BREAK_EVEN = 0.4
"""Sparsity below which a layer is multiplied dense: from 27 % down its groups are larger than the dense weight."""

_OLDEST = (8, 0)


class TritonRuntime:
    """Triton kernels on GPUs; a matrix that is hardly sparse stays dense."""

    name = "triton"
    devices = ("cuda",)

    def unavailable(self) -> str | None:
        """Needs Triton and a GPU of compute capability 8.0, or one from AMD."""
        if not torch.cuda.is_available():
            return "no CUDA device here; use --runtime torch-sparse or native with --device cpu"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (torch for CUDA brings it); use --runtime torch-sparse"
        capability = torch.cuda.get_device_capability()
        if torch.version.hip is None and capability < _OLDEST:
            has = ".".join(map(str, capability))
            return f"needs compute capability 8.0 and this GPU has {has}; use --runtime torch-sparse"
        return None

    def linear(self, matrix: SparseMatrix, bias: Tensor | None, layout: Layout) -> nn.Module:
        """A `TritonLinear`, or below `BREAK_EVEN` a `MaskedLinear`.

        Raises:
            UsageError: more columns than 16 bits can name, or more slots than 32 bits can count.
        """
        rows, columns = matrix.shape
        if matrix.nnz > (1 - BREAK_EVEN) * rows * columns:
            return MaskedLinear(matrix, bias, layout).to(layout.device)
        return TritonLinear(PackedRows.pack(matrix, layout.device), 0, bias, layout)

    def finish(self, module: nn.Module) -> None:
        """Join the linears that one launch can serve (`join_siblings`)."""
        join_siblings(module)


class PackedRows(nn.Module):
    """The rows of one matrix, or of several with the same inputs, in the encoding that takes the fewest bytes.

    Attributes:
        heights: rows of each matrix.
        columns: of all of them.
    """

    order: Tensor
    ptr: Tensor
    index: Tensor
    gaps: Tensor | None
    values: Tensor

    def __init__(
        self, heights: Sequence[int], columns: int, ptr: Tensor, index: Tensor, gaps: Tensor | None, values: Tensor
    ) -> None:
        super().__init__()
        self.heights = tuple(heights)
        self.columns = columns
        order = ptr.diff().argsort(descending=True, stable=True).to(torch.int32)
        # Not persistent: what is saved is the artifact's encoding, which the loader makes from `matrix`.
        for name, tensor in (("order", order), ("ptr", ptr), ("index", index), ("gaps", gaps), ("values", values)):
            self.register_buffer(name, tensor, persistent=False)
        self._last: tuple[Tensor | None, Sequence[Tensor]] = (None, ())

    @classmethod
    def pack(cls, matrix: SparseMatrix, device: torch.device) -> PackedRows:
        """One matrix, as `G8` or `InterleavedCsr`."""
        encoding: G8 | InterleavedCsr = G8()
        parts = encoding.encode(matrix)
        if cost(matrix) < nbytes(parts):
            encoding = InterleavedCsr()
            parts = encoding.encode(matrix)
        tensors = {name: parts[name].to(device) for name in encoding.tensors}
        ptr, index, *gaps, values = tensors.values()
        return cls([matrix.shape[0]], matrix.shape[1], ptr, index, gaps[0] if gaps else None, values)

    @classmethod
    def stack(cls, members: Sequence[PackedRows]) -> PackedRows:
        """The rows of several in one; all in the same encoding and dtype, with the same inputs."""
        starts = [0]
        for member in members:
            starts.append(starts[-1] + int(member.ptr[-1]))
        ptr = torch.cat([member.ptr[bool(start) :] + start for member, start in zip(members, starts, strict=False)])
        gaps = None if members[0].gaps is None else torch.cat([m.gaps for m in members if m.gaps is not None])
        heights = [height for member in members for height in member.heights]
        index, values = (torch.cat([getattr(member, name) for member in members]) for name in ("index", "values"))
        return cls(heights, members[0].columns, ptr, index, gaps, values)

    def tensors(self) -> Packed:
        """As the kernels take them."""
        return Packed(self.order, self.ptr, self.index, self.gaps, self.values, self.columns)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., columns] -> [..., rows]`` of all matrices, in the dtype of the inputs."""
        flat = inputs.reshape(-1, self.columns)
        output: Tensor = grouped_linear(flat, self.order, self.ptr, self.index, self.gaps, self.values)
        return output.reshape(*inputs.shape[:-1], output.shape[-1])

    def part(self, member: int, inputs: Tensor) -> Tensor:
        """What `forward` gives for one matrix. Members that are asked in turn with one tensor share one launch."""
        if len(self.heights) == 1:
            whole: Tensor = self(inputs)
            return whole
        seen, outputs = self._last
        if seen is not inputs:
            seen, outputs = inputs, self(inputs).split(self.heights, dim=-1)
        # The last member ends the round, so that no tensor outlives its use.
        self._last = (None, ()) if member == len(self.heights) - 1 else (seen, outputs)
        return outputs[member]

    def matrix(self, member: int) -> SparseMatrix:
        """One matrix, bit for bit, on the CPU."""
        top = sum(self.heights[:member])
        ptr = self.ptr[top : top + self.heights[member] + 1].cpu()
        groups = slice(int(ptr[0]), int(ptr[-1]))
        slots = slice(8 * groups.start, 8 * groups.stop)
        index = self.index[slots if self.gaps is None else groups].cpu()
        gaps = [] if self.gaps is None else [self.gaps[groups].cpu()]
        encoding: G8 | InterleavedCsr = InterleavedCsr() if self.gaps is None else G8()
        structure = (ptr - ptr[0], index, *gaps, self.values[slots].cpu())
        parts = dict(zip(encoding.tensors, structure, strict=True))
        return encoding.decode(parts, (self.heights[member], self.columns))


class TritonLinear(SparseLinear):
    """A layer whose weight is one matrix of `PackedRows`; sums are float32.

    Attributes:
        packed: the rows, perhaps with those of siblings.
        member: which of its matrices this is.
    """

    def __init__(self, packed: PackedRows, member: int, bias: Tensor | None, layout: Layout) -> None:
        super().__init__((packed.heights[member], packed.columns), bias, layout)
        self.packed = packed
        self.member = member

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in the dtype of the inputs."""
        output = self.packed.part(self.member, inputs)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def matrix(self) -> SparseMatrix:
        """The stored weights, bit for bit, on the CPU."""
        return self.packed.matrix(self.member)


def join_siblings(model: nn.Module) -> None:
    """Let the `siblings` of every module share their rows, if all are in one encoding and dtype and offsets suffice.

    The module must call them in turn, with a tensor that it does not change between them, as decoder blocks do.
    """
    for _, layers in siblings(model, TritonLinear):
        found = list(layers.values())
        kinds = {(layer.in_features, layer.packed.values.dtype, layer.packed.gaps is None) for layer in found}
        joined = len({layer.packed for layer in found}) < len(found)
        if joined or len(kinds) > 1 or sum(layer.packed.values.numel() for layer in found) > MOST_SLOTS:
            continue
        packed = PackedRows.stack([layer.packed for layer in found])
        for member, layer in enumerate(found):
            layer.packed, layer.member = packed, member
