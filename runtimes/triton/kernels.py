"""Kernels over rows of groups of eight (`converters.G8`, `converters.InterleavedCsr`), for any GPU that Triton knows.

A program takes ``ROWS`` rows, in the order of their counts so that they end about together, and ``LANES`` groups of
each at a time. Every thread then owns whole groups: values arrive in loads of 128 bits, the prefix sum over a group's
distances stays inside a thread, and no thread waits for another before the closing sum. Sums are float32, and in the
same order at every run: there are no atomics.

Interpreted (``TRITON_INTERPRET=1``) the same code runs on the CPU.
"""

import triton
import triton.language as tl

__all__ = ["expand", "reduce_splits", "spmm", "spmv"]


@triton.jit
def _rows(order, ptr, rows, ROWS: tl.constexpr):
    """A program's rows ``[ROWS]``, whether each exists, where its groups begin and end, and the most of any row."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < rows
    row = tl.load(order + place, mask=inside, other=0)
    begin = tl.load(ptr + row, mask=inside, other=0)
    end = tl.load(ptr + row + 1, mask=inside, other=0)
    return row, inside, begin, end, tl.max(end - begin, 0)


@triton.jit
def _distances(word, STEP: tl.constexpr):
    """STEP (1 or 2) times the distances ``[ROWS, LANES, 8]`` of the slots of groups from their base.

    A product adds up bytes from below: byte k of ``pairs * 0x01010101`` is the sum of bytes 0 to k, here at most 120.
    """
    u = tl.arange(0, 8)
    odd = (word >> 4) & 0x0F0F0F0F
    to_odd = ((word & 0x0F0F0F0F) + odd) * (0x01010101 * STEP)
    to_even = to_odd - odd * STEP
    both = tl.where((u & 1)[None, None, :] == 1, to_odd[:, :, None], to_even[:, :, None])
    return (both >> ((u >> 1) * 8)[None, None, :]) & 0xFF


@triton.jit
def _places(start, index, gaps, p, live, G8: tl.constexpr):
    """Pointers ``[ROWS, LANES, 8]`` to the columns of the groups ``p``, from ``start``; some column if not ``live``."""
    if G8:
        base = tl.load(index + p, mask=live, other=0).to(tl.int32) & 0xFFFF
        word = tl.load(gaps + p, mask=live, other=0)
        first = (start + base)[:, :, None]
        if start.dtype.element_ty.primitive_bitwidth == 16:
            # In bytes: one instruction less for each address, two where 64-bit products are not fused (sm_120).
            octets = first.to(tl.pointer_type(tl.int8), bitcast=True) + _distances(word, 2)
            return octets.to(start.dtype, bitcast=True)
        return first + _distances(word, 1)
    slots = p[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    column = tl.load(index + slots, mask=live[:, :, None], other=0).to(tl.int32) & 0xFFFF
    return start[:, :, None] + column


@triton.jit
def spmv(
    order, ptr, index, gaps, values, x, y, rows,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, G8: tl.constexpr,
):  # fmt: skip
    """``y[s, r]`` = the part of ``W[r] x`` in every SPLIT-th run of LANES groups, from the s-th on.

    order int32 [rows], ptr int32 [rows + 1], index int16, gaps int32 or any pointer, values [groups * 8], x [columns],
    y [SPLIT, rows]. Grid: (rows / ROWS, SPLIT).
    """
    part = tl.program_id(1)
    row, inside, begin, end, most = _rows(order, ptr, rows, ROWS)
    u = tl.arange(0, 8)
    sums = tl.zeros([ROWS, LANES, 8], tl.float32)
    for step in range(part * LANES, most, SPLIT * LANES):
        p = begin[:, None] + step + tl.arange(0, LANES)[None, :]
        live = p < end[:, None]
        v = tl.load(values + p[:, :, None] * 8 + u[None, None, :], mask=live[:, :, None], other=0.0)
        gathered = tl.load(_places(x + tl.zeros([ROWS, LANES], tl.int32), index, gaps, p, live, G8))
        sums += v.to(tl.float32) * gathered.to(tl.float32)
    whole = tl.sum(tl.sum(sums, 2), 1)
    tl.store(y + part * rows + row, whole.to(y.dtype.element_ty), mask=inside)


@triton.jit
def reduce_splits(parts, y, size, SPLIT: tl.constexpr, WIDTH: tl.constexpr):
    """``y[i]`` = the sum of float32 ``parts[s, i]`` over s. Grid: (size / WIDTH,)."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def spmm(
    order, ptr, index, gaps, values, xt, y, rows, tokens,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, G8: tl.constexpr,
):  # fmt: skip
    """``y[n, r] = W[r] x_n`` for a few tokens, each weight loaded once for all of them.

    As `spmv`, with xt ``[columns, TOKENS]``, so that one weight gathers a run of memory, and y ``[tokens, rows]``;
    TOKENS is the power of two that holds them. Grid: (rows / ROWS,).
    """
    row, inside, begin, end, most = _rows(order, ptr, rows, ROWS)
    n = tl.arange(0, TOKENS)
    sums = tl.zeros([ROWS, LANES, TOKENS], tl.float32)
    for step in range(0, most, LANES):
        p = begin[:, None] + step + tl.arange(0, LANES)[None, :]
        live = p < end[:, None]
        if G8:
            column = tl.load(index + p, mask=live, other=0).to(tl.int32) & 0xFFFF
            word = tl.load(gaps + p, mask=live, other=0)
        for u in tl.static_range(8):
            if G8:
                column += (word >> (4 * u)) & 15
            else:
                column = tl.load(index + p * 8 + u, mask=live, other=0).to(tl.int32) & 0xFFFF
            v = tl.load(values + p * 8 + u, mask=live, other=0.0)
            gathered = tl.load(xt + column[:, :, None] * TOKENS + n[None, None, :])
            sums += v.to(tl.float32)[:, :, None] * gathered.to(tl.float32)
    whole = tl.sum(sums, 1)
    to = y + n[None, :] * rows + row[:, None]
    tl.store(to, whole.to(y.dtype.element_ty), mask=inside[:, None] & (n < tokens)[None, :])


@triton.jit
def expand(
    order, ptr, index, gaps, values, w, rows, columns,
    ROWS: tl.constexpr, LANES: tl.constexpr, G8: tl.constexpr,
):  # fmt: skip
    """Write every weight to its place in w ``[rows, columns]``, which is all zero. Grid: (rows / ROWS,).

    Slots without a weight hold a zero, whose bits are none: only others are written.
    """
    row, _, begin, end, most = _rows(order, ptr, rows, ROWS)
    u = tl.arange(0, 8)
    start = w + row.to(tl.int64) * columns
    for step in range(0, most, LANES):
        p = begin[:, None] + step + tl.arange(0, LANES)[None, :]
        live = p < end[:, None]
        v = tl.load(values + p[:, :, None] * 8 + u[None, None, :], mask=live[:, :, None], other=0.0)
        to = _places(start[:, None] + tl.zeros([ROWS, LANES], tl.int32), index, gaps, p, live, G8)
        if values.dtype.element_ty.primitive_bitwidth == 32:
            bits = v.to(tl.int32, bitcast=True)
        else:
            bits = v.to(tl.int16, bitcast=True).to(tl.int32)
        tl.store(to, v, mask=live[:, :, None] & (bits != 0))
