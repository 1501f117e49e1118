"""Pruning on another device than the host's: where every tensor is made, which block is there, and what comes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from far_device import FAR, far_device
from tiny_models import tiny_tokens
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import trim_export
from trim_export.artifact import Artifact
from trim_export.curves import curves
from trim_export.forward import Compute
from trim_export.layer_budgets import LAYER_BUDGETS
from trim_export.models import decoder_blocks, load_model
from trim_export.prune import prune
from trim_export.recipe import Recipe
from trim_export.recover import METHODS, make_recovery, recover
from trim_export.row_budgets import ROW_BUDGETS, keep_best
from trim_export.scores import SCORES
from trim_export.statistics import input_statistics
from trim_export.structured import STRUCTURED, reduce_model
from trim_export.updates import UPDATES, LayerProblem, Support

PACKAGE = str(Path(trim_export.__file__).parent)
HERE = Compute(torch.device("cpu"), autocast=False)
THERE = Compute(FAR, autocast=False)


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
    "alpha.py:hill_alpha",  # a fit to a few singular values, brought to the host
    "format.py:guard",  # an empty tensor that goes to a file
    "spp.py:__init__",  # adapters, which go where their model goes
    "spp.py:_save_state",  # numbers that go to a file
    "packing.py:pack_windows",  # positions of tokens, which are in the host's memory
}
"""Places that work on the host on purpose, whatever the device."""

BUDGET = {name: make() for name, make in LAYER_BUDGETS.items()}
RECIPES = {
    "best": Recipe(0.6, rows="matrix", layers=BUDGET["owl"]),
    "paper": Recipe(0.6, rows="trim", layers=BUDGET["alpha"], update="none", counts="paper", context_length=0),
    "ria": Recipe(0.6, score="ria", rows="lagrangian", layers=BUDGET["dlp"], update="sparsegpt", targets="dense"),
    "anticipating": Recipe(0.6, rows="anticipating", layers=BUDGET["lsa-projection"], update="fista"),
    "blocks": Recipe(
        0.5, score="magnitude", layers=BUDGET["lsa"], pattern="block:2x4", update="refit", targets="own", head=True
    ),
}


@contextmanager
def alike() -> Iterator[None]:
    """The host computes as other devices do, not with kernels of its own."""
    with mock.patch("trim_export.curves._library", return_value=None), sdpa_kernel(SDPBackend.MATH):
        yield


def test_the_recipes_take_every_way_there_is() -> None:
    taken = RECIPES.values()
    assert {recipe.score for recipe in taken} == set(SCORES) - {"gblm"}  # gradients are below
    assert {recipe.rows for recipe in taken} == set(ROW_BUDGETS)
    assert {recipe.update for recipe in taken} == set(UPDATES) - {"admm-10"}  # admm with other numbers
    assert {recipe.layers.name for recipe in taken} == set(LAYER_BUDGETS) - {"auto", "uniform"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_pruning_there_gives_the_same_bytes(recipe: Recipe, tiny: Callable[..., Path], tmp_path: Path) -> None:
    with alike():
        expected = prune(load_model(str(tiny("llama"))), recipe, tiny_tokens(), tmp_path / "here", HERE)
        dense = load_model(str(tiny("llama")))
        with far_device(), NamedDevices() as watch:
            found = prune(dense, recipe, tiny_tokens(), tmp_path / "there", THERE)
    assert watch.lapses - HOST == set()
    assert {parameter.device.type for parameter in dense.model.parameters()} == {"cpu"}
    for file in expected.path.glob("*.safetensors"):
        assert (found.path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("method", ["gblm", *METHODS])
def test_what_takes_gradients_says_where_its_tensors_are(
    method: str, tiny: Callable[..., Path], pruned: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact, dense = pruned("llama"), load_model(str(tiny("llama")))
    with NamedDevices() as watch:
        if method == "gblm":
            prune(dense, Recipe(0.6, score="gblm"), tiny_tokens(), tmp_path / "a", HERE)
        else:
            recovery = make_recovery(method, "text", steps=2)
            recover(artifact, dense, recovery, tiny_tokens(8), tmp_path / "a", HERE)
    assert watch.lapses - HOST == set()


def test_the_watch_sees_a_lapse() -> None:
    code = compile("def made(torch):\n    return torch.zeros(3)\n", f"{PACKAGE}/somewhere.py", "exec")
    scope: dict[str, Any] = {}
    exec(code, scope)
    with NamedDevices() as watch:
        scope["made"](torch)
    assert watch.lapses == {"somewhere.py:made"}


@pytest.mark.parametrize("update", ["none", "admm"])
def test_one_block_is_there_while_the_model_stays_in_the_host(
    update: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    dense = load_model(str(tiny("gpt-neox")))  # three blocks
    blocks = decoder_blocks(dense.model)
    seen: list[tuple[str, ...]] = []

    def look(module: nn.Module, args: Any) -> None:
        there = [name for name, block in blocks.items() if {p.device for p in block.parameters()} == {FAR}]
        others = {p.device.type for name, p in dense.model.named_parameters() if not name.startswith(tuple(there))}
        assert not there or others == {"cpu"}
        seen.append(tuple(there))

    for block in blocks.values():
        block.register_forward_pre_hook(look)
    with far_device():
        prune(dense, Recipe(0.6, layers=BUDGET["owl"], update=update), tiny_tokens(), tmp_path / "a", THERE)
    # In the host's memory while text is embedded and calls are recorded; to measure; and to prune.
    visits = [there for there, before in zip(seen, [(), *seen], strict=False) if there != before]
    assert visits == [(name,) for name in [*blocks, *blocks]]


@pytest.mark.parametrize("method", ["shortgpt", "flap"])
def test_structured_pruning_there_gives_the_same_model(method: str, tiny: Callable[..., Path]) -> None:
    with alike():
        expected = reduce_model(load_model(str(tiny("llama"))), STRUCTURED[method], 0.3, tiny_tokens(), HERE)
        with far_device():
            found = reduce_model(load_model(str(tiny("llama"))), STRUCTURED[method], 0.3, tiny_tokens(), THERE)
    assert found.structured == expected.structured
    weights = expected.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.model.state_dict().items())


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_statistics_scores_and_curves_are_made_where_their_tensors_are() -> None:
    def measured(device: torch.device) -> list[Tensor]:
        weight, order = random(6, 10).to(device), random(6, 10).argsort(dim=1).to(device)
        inputs = input_statistics(random(4, 7, 10).to(device), "layer")
        scores = [score.formula(weight, inputs, weight.abs()) for score in SCORES.values()]
        found = curves(weight, order, inputs.last_tokens)
        mask = keep_best(scores[0], torch.arange(6, device=device))
        return [inputs.mean_square, *scores, found.numerator, found.norm2, found.target_norm2, mask.float()]

    with alike():
        assert_same_there(measured)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("update", UPDATES)
def test_updates_are_made_where_their_tensors_are(update: str, by_row: bool) -> None:
    inputs, mask = random(10, 40), random(6, 10) > 0

    def updated(device: torch.device) -> list[Tensor]:
        problem = LayerProblem(
            *(tensor.to(device) for tensor in (random(6, 10), inputs @ inputs.T, random(6, 40) @ inputs.T))
        )
        found = UPDATES[update](problem, Support(mask.to(device), by_row))
        return [found.weight, found.mask.float()]

    assert_same_there(updated)


def assert_same_there(compute: Callable[[torch.device], list[Tensor]]) -> None:
    with far_device():
        there = compute(FAR)
        assert {tensor.device for tensor in there} == {FAR}
        brought = [tensor.cpu() for tensor in there]
    assert all(torch.equal(one, other) for one, other in zip(brought, compute(HERE.device), strict=True))


def test_the_device_refuses_tensors_of_the_host() -> None:
    with far_device():
        there = torch.eye(3, device=FAR) * 2
        assert torch.equal((there @ there).cpu(), torch.eye(3) * 4)
        for wrong in (lambda: there @ torch.eye(3), lambda: there + torch.ones(3), lambda: there.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
