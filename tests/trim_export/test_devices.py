"""Pruning names the device of every tensor that it makes, so that on a GPU nothing lands on the host by accident."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokens
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import trim_export
from trim_export.curves import _portable_curves
from trim_export.forward import Compute
from trim_export.models import load_model
from trim_export.prune import prune
from trim_export.recipe import Recipe

PACKAGE = str(Path(trim_export.__file__).parent)


class NamedDevices(TorchFunctionMode):
    """Notes where our own code makes a tensor without saying on which device.

    Attributes:
        lapses: ``file:function`` of each such place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lapses: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            frame = sys._getframe(1)
            file = Path(frame.f_code.co_filename)
            if str(file).startswith(PACKAGE):
                self.lapses.add(f"{file.name}:{frame.f_code.co_name}")
        return func(*args, **kwargs)


HOST = {
    "row_budgets.py:anticipating",  # levels, which become Python numbers at once
    "lagrangian.py:allocate",  # scipy's regression, from errors brought to the host
    "format.py:guard",  # an empty tensor that goes to a file
    "packing.py:pack_windows",  # positions of tokens, which are in the host's memory
}
"""Places that work on the host on purpose, whatever the device."""


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(0.6),
        Recipe(0.6, rows="trim", update="refit", context_length=0),
        Recipe(0.6, rows="anticipating", update="sparsegpt"),
    ],
    ids=["admm", "trim and refit", "anticipating and sparsegpt"],
)
def test_pruning_says_where_its_tensors_are(recipe: Recipe, tiny: Callable[..., Path], tmp_path: Path) -> None:
    dense = load_model(str(tiny("llama")))
    with NamedDevices() as watch:
        prune(dense, recipe, tiny_tokens(), tmp_path / "a", Compute(torch.device("cpu"), False))
    assert watch.lapses - HOST == set()


def test_the_watch_sees_a_lapse() -> None:
    code = compile("def made(torch):\n    return torch.zeros(3)\n", f"{PACKAGE}/somewhere.py", "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)
    with NamedDevices() as watch:
        scope["made"](torch)
    assert watch.lapses == {"somewhere.py:made"}


def test_curves_stay_on_the_device_of_their_weight() -> None:
    weight, inputs = torch.empty(6, 9, device="meta"), torch.empty(9, 4, device="meta")
    order = torch.empty(6, 9, dtype=torch.int64, device="meta")
    numerator, norm2 = _portable_curves(weight, order, inputs, weight @ inputs)
    assert (numerator.device.type, norm2.device.type) == ("meta", "meta")
    assert numerator.shape == norm2.shape == (6, 10)
