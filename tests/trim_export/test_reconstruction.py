"""Block reconstruction against weighted least squares, and what it promises about the held-out windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scarce import fails_at
from torch import Tensor, nn

from trim_export.errors import ModelError
from trim_export.forward import BlockCall, Compute
from trim_export.reconstruction import reconstruct_block, relative_error
from trim_export.training import Fit, Training, held_out_windows

CPU = Compute(torch.device("cpu"), autocast=False)
CALL = BlockCall((), {}, gives_tuple=False)


class Case:
    """A block of one or two layers with half of its weights gone, and streams that differ a little."""

    def __init__(self, dtype: torch.dtype = torch.float32, deep: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        sizes = [(12, 12), (12, 12)] if deep else [(12, 12)]
        layers: list[nn.Module] = []
        for rows, columns in sizes:
            layers += [nn.Linear(columns, rows), nn.Tanh()]
        self.block = nn.Sequential(*layers[:-1]).requires_grad_(False)
        for parameter in self.block.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) / 3
        self.block.to(dtype)
        # Correlated inputs: what is left of a row can stand in for what is gone.
        dense = torch.randn(32, 16, 5, generator=draw) @ torch.randn(5, 12, generator=draw)
        dense = (dense + 0.1 * torch.randn(dense.shape, generator=draw)).to(dtype)
        self.target = self.block(dense)
        self.hidden = (dense.float() + 0.2 * torch.randn(dense.shape, generator=draw)).to(dtype)
        self.masks = {}
        for index in range(0, len(layers), 2):
            linear = self.block[index]
            assert isinstance(linear, nn.Linear)
            self.masks[str(index)] = torch.rand(linear.weight.shape, generator=draw) < 0.5
            linear.weight.data *= self.masks[str(index)]

    def weights(self) -> list[Tensor]:
        return [self.block.get_parameter(f"{path}.weight").clone() for path in self.masks]

    def held_out_loss(self) -> float:
        held = held_out_windows(len(self.hidden))
        return float(relative_error(self.block(self.hidden[-held:]), self.target[-held:]))

    def reconstruct(self, steps: int = 300, rate: float = 0.02) -> Fit:
        training = Training(steps, rate, seed=0)
        return reconstruct_block(
            "model.layers.7", self.block, self.masks, CALL, self.hidden, self.target, training, CPU
        )


def test_relative_error_is_the_mean_of_relative_squares() -> None:
    draw = np.random.default_rng(0)
    output, target = draw.normal(size=(3, 5, 7)), draw.normal(size=(3, 5, 7)) * 100
    expected = np.mean(((output - target) ** 2).sum(-1) / (target**2).sum(-1))
    assert float(relative_error(torch.tensor(output), torch.tensor(target))) == pytest.approx(expected, rel=1e-5)


def test_a_linear_block_reaches_the_least_squares_optimum() -> None:
    case = Case()
    held = held_out_windows(len(case.hidden))
    inputs = case.hidden[:-held].reshape(-1, 12).double().numpy()
    bias = case.block.get_parameter("0.bias").double().numpy()
    wanted = case.target[:-held].reshape(-1, 12).double().numpy()
    root = 1 / np.linalg.norm(wanted, axis=1)
    optimum = np.zeros((12, 12))
    for row, mask in enumerate(case.masks["0"].numpy()):
        columns = np.linalg.lstsq(inputs[:, mask] * root[:, None], (wanted[:, row] - bias[row]) * root, rcond=None)
        optimum[row, mask] = columns[0]
    before = case.held_out_loss()
    fit = case.reconstruct()
    reached = case.held_out_loss()
    case.block.get_parameter("0.weight").data = torch.tensor(optimum, dtype=torch.float32)
    assert fit.before == pytest.approx(before, rel=1e-5)
    assert fit.after == pytest.approx(reached, rel=1e-5)
    assert reached < 0.7 * before
    assert reached == pytest.approx(case.held_out_loss(), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_measured_is_what_is_stored(dtype: torch.dtype) -> None:
    case = Case(dtype, deep=True)
    fit = case.reconstruct(steps=40)
    assert 0 < fit.step <= 40
    assert fit.after < 0.9 * fit.before
    assert case.held_out_loss() == pytest.approx(fit.after, rel=1e-5)
    for weight, mask in zip(case.weights(), case.masks.values(), strict=True):
        assert weight.dtype == dtype
        assert not weight[~mask].any()


def test_training_that_only_harms_leaves_every_bit_as_it_was() -> None:
    case = Case(deep=True)
    before = case.weights()
    fit = case.reconstruct(steps=12, rate=1e4)
    assert fit.step == 0
    assert fit.after == fit.before
    assert all(torch.equal(old, new) for old, new in zip(before, case.weights(), strict=True))


@pytest.mark.parametrize("call", [1, 4])  # on the held-out windows, and in a step
def test_out_of_memory_changes_no_more_than_rounding(call: int, caplog: pytest.LogCaptureFixture) -> None:
    expected, found = Case(), Case()
    undisturbed = expected.reconstruct(steps=10)
    assert caplog.text == ""
    with fails_at(found.block, call):
        fit = found.reconstruct(steps=10)
    assert caplog.text.count("out of memory: trying again") == 1
    assert fit.after == pytest.approx(undisturbed.after, rel=1e-4)
    torch.testing.assert_close(found.weights(), expected.weights(), rtol=1e-3, atol=1e-4)


def test_biases_stay_and_nothing_else_hangs_on_the_block() -> None:
    case = Case(deep=True)
    before = {name: value.clone() for name, value in case.block.state_dict().items()}
    case.reconstruct(steps=10)
    after = case.block.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.endswith("bias")
    assert not any(parameter.requires_grad for parameter in case.block.parameters())


def test_activations_that_are_not_finite_are_refused_by_name() -> None:
    case = Case()
    case.hidden[-1, 3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"^model\.layers\.7: NaN or infinity"):
        case.reconstruct(steps=1)
