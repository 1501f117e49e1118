"""Which kernel multiplies, in what shape, and the launches themselves.

Nothing here waits for the GPU or asks it anything, so a CUDA graph can record it. Every function takes tensors of
whatever device Triton runs on: interpreted, they are the CPU's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trim_export.runtimes.triton.tuning import Choice, choice_for

__all__ = ["Packed", "by_expanding", "by_gathering", "by_gathering_few", "few_lanes", "multiply", "splits"]

ROWS = 4
"""Rows of a program: one for each of its four warps."""
LANES = 32
"""Groups that a program takes of each row at a time."""
EXPAND_LANES = 16
FEW = 16
"""Most tokens that `by_gathering_few` takes at once."""
_REDUCE_WIDTH = 256
_WARPS = 48
"""Warps that a multiprocessor runs at a time, the least of all supported ones."""


@dataclass(frozen=True)
class Packed:
    """Rows of groups, as the kernels take them.

    Attributes:
        order: int32 ``[rows]``, the rows by their counts, most first.
        ptr: int32 ``[rows + 1]``, groups before each row; need not begin at 0.
        index: int16, a base for each group (`G8`) or a column for each slot (`InterleavedCsr`).
        gaps: int32 ``[groups]`` for `G8`, else None.
        values: ``[groups * 8]``.
        columns: of the matrix.
    """

    order: Tensor
    ptr: Tensor
    index: Tensor
    gaps: Tensor | None
    values: Tensor
    columns: int

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return self.order.shape[0]

    def arguments(self) -> Sequence[Tensor]:
        """What every kernel takes first."""
        return self.order, self.ptr, self.index, self.index if self.gaps is None else self.gaps, self.values


def multiply(packed: Packed, inputs: Tensor) -> Tensor:
    """``inputs W^T`` for inputs ``[tokens, columns]``, by the kernel that is expected to be the fastest."""
    tokens = inputs.shape[0]
    choice = choice_for(inputs.device)
    if tokens == 1:
        return by_gathering(packed, inputs, splits(packed, inputs.device, choice))
    if tokens <= min(choice.gathered_tokens, FEW):
        return by_gathering_few(packed, inputs)
    return by_expanding(packed, inputs)


def by_gathering(packed: Packed, inputs: Tensor, parts: int) -> Tensor:
    """One token ``[1, columns]``; each row is cut into ``parts``, whose sums are added in their order."""
    kernels = _kernels()
    x, rows = inputs.contiguous(), packed.rows
    output = x.new_empty(1, rows)
    sums = output if parts == 1 else x.new_empty(parts, rows, dtype=torch.float32)
    with _on(x.device):
        kernels.spmv[_cover(rows, ROWS), parts](
            *packed.arguments(), x, sums, rows, SPLIT=parts, ROWS=ROWS, LANES=LANES, G8=packed.gaps is not None
        )
        if parts > 1:
            kernels.reduce_splits[(_cover(rows, _REDUCE_WIDTH),)](sums, output, rows, SPLIT=parts, WIDTH=_REDUCE_WIDTH)
    return output


def by_gathering_few(packed: Packed, inputs: Tensor) -> Tensor:
    """Up to `FEW` tokens ``[tokens, columns]``."""
    tokens, rows = inputs.shape[0], packed.rows
    width = 1 << (tokens - 1).bit_length()
    # What a column gives to all tokens lies side by side; beyond the tokens it is never stored.
    turned = inputs.new_zeros(packed.columns, width)
    turned[:, :tokens] = inputs.t()
    output = inputs.new_empty(tokens, rows)
    with _on(inputs.device):
        _kernels().spmm[(_cover(rows, ROWS),)](
            *packed.arguments(), turned, output, rows, tokens,
            TOKENS=width, ROWS=ROWS, LANES=few_lanes(width), G8=packed.gaps is not None,
        )  # fmt: skip
    return output


def by_expanding(packed: Packed, inputs: Tensor) -> Tensor:
    """Any number of tokens: the dense weight is made, multiplied and dropped.

    All layers share one scratch: the allocator gives the next one what this one has returned.
    """
    weight = packed.values.new_zeros(packed.rows, packed.columns)
    with _on(inputs.device):
        _kernels().expand[(_cover(packed.rows, ROWS),)](
            *packed.arguments(), weight, packed.rows, packed.columns,
            ROWS=ROWS, LANES=EXPAND_LANES, G8=packed.gaps is not None,
        )  # fmt: skip
    return torch.nn.functional.linear(inputs, weight.to(inputs.dtype))


def few_lanes(width: int) -> int:
    """Groups of a row that `kernels.spmm` takes at a time for ``width`` tokens: as many as registers hold sums for."""
    return min(LANES, 256 // width)


def splits(packed: Packed, device: torch.device, choice: Choice) -> int:
    """Into how many parts, a power of two, rows are cut so that every multiprocessor has work."""
    wanted = choice.waves * _multiprocessors(device) * _WARPS
    # A part should still fill a warp once.
    steps = packed.index.numel() // (1 if packed.gaps is not None else 8) // max(1, packed.rows * LANES)
    parts = 1
    while 2 * parts <= min(16, steps) and packed.rows * parts < wanted:
        parts *= 2
    return parts


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(device: torch.device) -> Any:
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _kernels() -> Any:
    """The kernels; imported late, because Triton is there only where torch was built for a GPU."""
    from trim_export.runtimes.triton import kernels

    return kernels


def _cover(size: int, step: int) -> int:
    return -(-size // step)
