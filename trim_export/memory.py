"""Going on with less at a time when a device's memory is out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["halving"]

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
