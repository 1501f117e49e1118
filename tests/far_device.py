"""A device apart from the host: ``meta`` tensors that have values after all, but may not meet those of the host.

What runs on it computes what the CPU computes, and fails where it would fail on a GPU: at every operation between a
tensor there and one in the host's memory, and wherever a library wants to read a tensor that is not. Attention goes
the way of devices without kernels for it; gradients are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["FAR", "far_device"]

FAR = torch.device("meta")

_BETWEEN = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""Operators that bring values from one device to the other."""


class _Far(Tensor):
    """A tensor on `FAR`; its values are in a tensor of the host's."""

    host: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _Far:
        far: _Far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=FAR,
        )  # fmt: skip
        far.host = values
        return far

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # implemented for no subclass
            return args[0].cpu().tolist()
        if func == Tensor.data.__set__ and isinstance(args[0], _Far):
            if not isinstance(args[1], _Far):
                raise RuntimeError("a tensor on the far device is given data in the host's memory")
            args[0].host = args[1].host
            return None
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor of the far device outlived it")


class _Computing(TorchDispatchMode):
    """Operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        far = {id(tensor.host): tensor for tensor in given if isinstance(tensor, _Far)}
        wanted = kwargs.get("device")
        if not far and wanted != FAR:
            return func(*args, **kwargs)
        if far and func not in _BETWEEN and any(tensor.dim() and not isinstance(tensor, _Far) for tensor in given):
            raise RuntimeError(f"{func}: tensors on the far device and in the host's memory")
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map_only(_Far, lambda tensor: tensor.host, (args, kwargs))
        made = func(*args, **kwargs)
        if (wanted is not None and wanted != FAR) or (func is _BETWEEN[1] and made is args[0] and id(made) not in far):
            return made
        # What was written to in place is the very tensor that was given.
        return tree_map_only(Tensor, lambda tensor: far[id(tensor)] if id(tensor) in far else _Far(tensor), made)


class _Reading(TorchFunctionMode):
    """Numbers of Python's, which torch does not read where there are only shapes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") == FAR:
            del kwargs["device"]
            return torch.tensor(*args, **kwargs).to(FAR)
        return func(*args, **kwargs)


@contextmanager
def far_device() -> Iterator[None]:
    """While this is entered, `FAR` is a device that computes."""
    with _Computing(), _Reading():
        yield
