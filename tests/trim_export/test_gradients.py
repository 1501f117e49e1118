"""Gradient norms against autograd in float64, one window after the other; and that the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokens
from torch import Tensor, nn

from trim_export.errors import ModelError
from trim_export.forward import Compute
from trim_export.gradients import gradient_norms
from trim_export.models import decoder_blocks, load_model, projections
from trim_export.prune import prune
from trim_export.recipe import Recipe

CPU = Compute(torch.device("cpu"), autocast=False)
TOKENS = tiny_tokens(windows=3, length=10)


def naive(kind: str, tokens: Tensor) -> dict[str, Tensor]:
    """Every parameter takes gradients; each window's are kept, squared and summed in float64."""
    model = tiny_model(kind).double().requires_grad_(True)
    squares: dict[str, Tensor] = {}
    for window in tokens:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, window[1:])
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                squares[name] = squares.get(name, torch.zeros(())) + gradient.square()
    return {name: square.sqrt() for name, square in squares.items()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_norms_are_those_of_each_windows_gradient(kind: str) -> None:
    model = tiny_model(kind)
    blocks = decoder_blocks(model)
    norms = gradient_norms(model, blocks, TOKENS, CPU)
    expected = naive(kind, TOKENS)
    assert list(norms) == list(blocks)
    for name, block in blocks.items():
        assert set(norms[name]) == set(projections(block))
        for path, norm in norms[name].items():
            exact = expected[f"{name}.{path}.weight"]
            assert norm.dtype == torch.float32
            assert exact.max() > 0
            torch.testing.assert_close(norm.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.max()))


def test_windows_that_cancel_do_not_cancel_in_the_norm() -> None:
    """The norm is over windows, not of their mean: of twice the same window it is the square root of two larger."""
    model = tiny_model("llama")
    blocks = decoder_blocks(model)
    once, twice = (gradient_norms(model, blocks, TOKENS[[0] * times], CPU) for times in (1, 2))
    for name in blocks:
        for path in once[name]:
            torch.testing.assert_close(twice[name][path], once[name][path] * 2**0.5)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("opt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.get_submodule("model.decoder.layers.1").eval()
    model.get_parameter("model.decoder.layers.0.fc1.weight").requires_grad_(True)
    model.get_parameter("model.decoder.layers.0.fc1.bias").requires_grad_(True)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gradient_norms(model, decoder_blocks(model), TOKENS, CPU)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dropout_is_off_and_the_answer_the_same_twice() -> None:
    model = tiny_model("opt").train()
    model.config.dropout = 0.5
    for layer in model.model.decoder.layers:
        layer.dropout = 0.5
    one, other = (gradient_norms(model, decoder_blocks(model), TOKENS, CPU) for _ in range(2))
    assert all(torch.equal(norm, other[name][path]) for name in one for path, norm in one[name].items())


def test_never_more_than_one_gradient_is_alive() -> None:
    """When a layer's gradient arrives, those before it are already gone."""
    model = tiny_model("llama")
    blocks = decoder_blocks(model)
    weights = [linear.weight for block in blocks.values() for linear in projections(block).values()]
    alive = []
    for weight in weights:
        weight.requires_grad_(True).register_hook(
            lambda gradient: alive.append(sum(weight.grad is not None for weight in weights))
        )
    gradient_norms(model, blocks, TOKENS[:1], CPU)
    assert alive == [0] * len(weights)


def test_text_from_inference_mode_and_a_caller_without_gradients_are_fine() -> None:
    model = tiny_model("llama")
    blocks = decoder_blocks(model)
    with torch.inference_mode():
        written = TOKENS.clone()
    with torch.no_grad():
        norms = gradient_norms(model, blocks, written, CPU)
    expected = gradient_norms(model, blocks, TOKENS, CPU)
    assert all(torch.equal(norm, expected[name][path]) for name in norms for path, norm in norms[name].items())


def test_autocast_and_half_precision_give_float32_norms() -> None:
    exact = gradient_norms(model := tiny_model("llama"), decoder_blocks(model), TOKENS, CPU)
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model = tiny_model("llama", dtype)
        norms = gradient_norms(model, decoder_blocks(model), TOKENS, Compute(torch.device("cpu"), autocast))
        for name, inside in norms.items():
            for path, norm in inside.items():
                assert norm.dtype == torch.float32
                assert (norm - exact[name][path]).norm() < 0.1 * exact[name][path].norm()


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("model.layers.0.mlp.up_proj.weight", r"^model\.layers\.0\.mlp\.up_proj: NaN or infinity in its weights"),
        ("model.norm.weight", r"^model\.layers\.\d\.[\w.]+: NaN or infinity in the gradient"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_layer_and_leave_no_trace(tensor: str, named: str) -> None:
    model = tiny_model("llama")
    model.state_dict()[tensor][..., 3] = float("nan")
    with pytest.raises(ModelError, match=named) as caught:
        gradient_norms(model, decoder_blocks(model), TOKENS, CPU)
    assert "\n" not in str(caught.value)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_pruning_by_gblm_measures_the_dense_model_once_and_takes_it_into_account(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    described: list[str] = []

    def track(items: list[object], description: str) -> list[object]:
        described.append(description)
        return items

    dense = load_model(str(tiny("llama")))
    norms = gradient_norms(dense.model, decoder_blocks(dense.model), TOKENS, CPU)
    weights = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    inputs: list[Tensor] = []
    first = "model.layers.0.self_attn.q_proj"
    handle = dense.model.get_submodule(first).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    dense.model(TOKENS)
    handle.remove()
    recipe = Recipe(0.5, score="gblm", rows="uniform", update="none", context_length=0)
    artifact = prune(dense, recipe, TOKENS, tmp_path / "out", CPU, track=track)
    assert described == ["measuring gradients", "pruning"]

    norm = (inputs[0].double().square().sum(dim=(0, 1)) / len(TOKENS)).sqrt()
    slope = norms["model.layers.0"]["self_attn.q_proj"].double()
    score = weights[f"{first}.weight"].double().abs() * (norm + 100 * slope)
    mask = artifact.matrix(first, artifact.modules[first]).mask
    expected = torch.zeros_like(mask).scatter_(1, score.argsort(dim=1)[:, 16:], True)
    assert torch.equal(mask, expected)
    by_wanda = weights[f"{first}.weight"].double().abs() * norm
    assert not torch.equal(mask, torch.zeros_like(mask).scatter_(1, by_wanda.argsort(dim=1)[:, 16:], True))
