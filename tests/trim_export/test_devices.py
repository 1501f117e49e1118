"""Pruning names the device of every tensor that it makes, so that on a GPU nothing lands on the host by accident."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokens
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trim_export
from trim_export.curves import curves
from trim_export.forward import Compute
from trim_export.models import load_model
from trim_export.prune import prune
from trim_export.recipe import Recipe
from trim_export.row_budgets import keep_best
from trim_export.scores import SCORES
from trim_export.statistics import input_statistics
from trim_export.updates import UPDATES, LayerProblem, Support

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


class Valueless(TorchDispatchMode):
    """Runs code on tensors that have shapes and no values (``meta``), and answers what it asks of their values.

    Every value is one or true, and every integer zero.

    Attributes:
        strays: operators that made something else than a single number outside of ``meta``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strays: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return True if args[0].is_floating_point() or args[0].dtype is torch.bool else 0
        if func is aten.equal.default:
            return True
        if func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            return torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu")
        made = func(*args, **kwargs)
        self.strays |= {str(func) for found in tree_leaves(made)
                        if isinstance(found, Tensor) and found.dim() > 0 and found.device.type != "meta"}  # fmt: skip
        return made


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_statistics_scores_and_curves_run_where_their_tensors_are() -> None:
    weight = shaped(6, 10)
    with Valueless() as mode:
        inputs = input_statistics(shaped(4, 7, 10), "layer")
        scores = {name: score.formula(weight, inputs, weight) for name, score in SCORES.items()}
        found = curves(weight, scores["wanda"].argsort(dim=1), inputs.last_tokens)
        mask = keep_best(scores["wanda"], shaped(6, dtype=torch.int64))
    assert mode.strays == set()
    assert (inputs.mean_square.shape, inputs.last_tokens.shape) == ((10,), (10, 4))
    assert {score.shape for score in scores.values()} == {(6, 10)}
    assert found.numerator.shape == found.norm2.shape == (6, 11)
    assert found.target_norm2.shape == (6,)
    assert (mask.shape, mask.dtype, mask.device.type) == ((6, 10), torch.bool, "meta")


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("update", UPDATES)
def test_updates_run_where_their_tensors_are(update: str, by_row: bool) -> None:
    support = Support(shaped(6, 10, dtype=torch.bool), by_row)
    with Valueless() as mode:
        found = UPDATES[update](LayerProblem(shaped(6, 10), shaped(10, 10), shaped(6, 10)), support)
    assert mode.strays == set()
    assert (found.weight.shape, found.weight.dtype, found.weight.device.type) == ((6, 10), torch.float32, "meta")
    assert (found.mask.shape, found.mask.dtype, found.mask.device.type) == ((6, 10), torch.bool, "meta")


def test_the_mode_sees_a_stray() -> None:
    with Valueless() as mode:
        shaped(3, 3) @ torch.zeros(3, 3)
    assert mode.strays == {"aten.zeros.default"}
