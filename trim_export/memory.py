"""Going on with less at a time when a device's memory is out, and giving back what was freed."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["halving", "return_freed"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def halving(attempt: Callable[[int], T], size: int, least: int, device: torch.device, unit: str) -> T:
    """What ``attempt(size)`` gives, or where that runs out of memory, with half the size, half of that, and so on.

    Args:
        attempt: begins anew each time it is called.
        size: how much it takes at a time.
        least: the size that cannot be made smaller.
        device, unit: whose memory, and what is counted, for the log.

    Raises:
        torch.OutOfMemoryError: of the attempt with the least size.
    """
    while True:
        try:
            return attempt(size)
        except torch.OutOfMemoryError:
            if size <= least:
                raise
        # Outside of the handler, which holds on to what the attempt had.
        size = max(least, size // 2)
        logger.warning("%s is out of memory: trying again with %d %s at a time", device, size, unit)


def return_freed() -> None:
    """Give freed memory of the CPU back to the system, where the C library would keep it (glibc does)."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if os.name != "posix":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
