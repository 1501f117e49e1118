"""Devices that run out of memory, without one: layers that refuse what is too much for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fails_at", "holding"]


@contextmanager
def holding(model: nn.Module, tokens: int) -> Iterator[None]:
    """Memory in which the inputs of no layer of ``model`` may be more than so many tokens."""

    def refuse(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].numel() > tokens * args[0].shape[-1]:
            raise torch.OutOfMemoryError("too large")

    handles = [part.register_forward_pre_hook(refuse) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def fails_at(layer: nn.Module, call: int) -> Iterator[None]:
    """Memory that runs out once, when ``layer`` is called the ``call``-th time, counted from 1; that has to come."""
    calls = 0

    def refuse(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("taken by somebody else")

    handle = layer.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
    assert calls >= call
