"""Memory for weights on huge pages, where the system has them.

A product reads all of its weights once, front to back. On pages of 4 KiB that is a look-up of an address every 4 KiB,
which takes longest where it is done twice, on virtual machines.
"""

from __future__ import annotations

import math
import mmap
import threading

import torch
from torch import Tensor

__all__ = ["zeros"]

_CHUNK = 1 << 25  # bytes that tensors are cut from; the system gives memory only to what is written
_ALIGNMENT = 64


class _Chunks:
    """Where the next tensor will be: each chunk lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def take(self, size: int) -> tuple[mmap.mmap, int]:
        """A chunk with ``size`` bytes free, and where they begin."""
        size += -size % _ALIGNMENT
        if size > _CHUNK // 2:
            return _mapped(size), 0
        with self._lock:
            if self._chunk is None or self._used + size > _CHUNK:
                self._chunk, self._used = _mapped(_CHUNK), 0
            self._used += size
            return self._chunk, self._used - size


def _mapped(size: int) -> mmap.mmap:
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


_chunks = _Chunks()


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.zeros` on the CPU, in memory that is read fast from front to back."""
    count = math.prod(shape)
    if not count:
        return torch.zeros(shape, dtype=dtype)
    chunk, offset = _chunks.take(count * dtype.itemsize)
    return torch.frombuffer(chunk, dtype=dtype, count=count, offset=offset).reshape(shape)
