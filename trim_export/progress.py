"""Showing progress without knowing where it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["Track", "silently"]

T = TypeVar("T")
Track = Callable[[Iterable[T], str], Iterable[T]]
"""Wraps an iteration to show its progress under a description."""


def silently(items: Iterable[T], description: str) -> Iterable[T]:
    """A `Track` that shows nothing."""
    return items
