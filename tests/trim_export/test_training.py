"""What recoveries share: which windows when, and at which rate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trim_export.training import Training, backward, held_out_windows, learning_rate, mean_loss, window_batches


@given(windows=st.integers(1, 40), length=st.sampled_from([1, 100, 128, 1024, 5000]), steps=st.integers(1, 30))
def test_every_window_comes_once_before_any_comes_again(windows: int, length: int, steps: int) -> None:
    batches = window_batches(windows, length, Training(steps, 1e-3, seed=3))
    assert len(batches) == steps
    assert {len(batch) for batch in batches} == {min(windows, max(1, 1024 // length))}
    order = torch.cat(batches)
    for begin in range(0, len(order), windows):
        part = order[begin : begin + windows]
        assert len(part.unique()) == len(part)
        assert set(part.tolist()) <= set(range(windows))


def test_the_order_depends_on_the_seed_alone_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (torch.cat(window_batches(50, 128, Training(9, 1e-3, seed))) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


@given(steps=st.integers(1, 300), peak=st.floats(1e-6, 1))
def test_the_rate_rises_to_its_peak_and_falls_as_a_cosine(steps: int, peak: float) -> None:
    rates = [learning_rate(Training(steps, peak, 0), step) for step in range(1, steps + 1)]
    top = max(range(steps), key=rates.__getitem__)
    assert rates[top] == pytest.approx(peak)
    assert top + 1 == math.ceil(0.05 * steps)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] > 0
    halfway = top + (steps + 1 - (top + 1)) // 2
    if steps > 100:
        assert rates[halfway] == pytest.approx(peak / 2, rel=0.05)


@pytest.mark.parametrize(("windows", "held"), [(2, 1), (15, 1), (16, 2), (128, 16)])
def test_an_eighth_of_the_windows_is_held_out(windows: int, held: int) -> None:
    assert held_out_windows(windows) == held


@pytest.mark.parametrize("most", [7, 4, 1])
def test_out_of_memory_cuts_a_loss_into_parts_of_the_same_sum(most: int, caplog: pytest.LogCaptureFixture) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(9, 5, generator=draw), torch.randn(5, generator=draw).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    windows = torch.tensor([8, 1, 3, 0, 5, 2, 7])

    def loss(part: Tensor) -> Tensor:
        found = (inputs[part] @ weight).square().mean()
        if len(part) > most:
            raise torch.OutOfMemoryError("too large")
        return found

    backward(loss, windows, optimizer, weight.device)
    exact = inputs[windows].double()
    outputs = exact @ weight.detach().double()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), 2 * outputs @ exact / len(windows), rtol=1e-5, atol=1e-6)
    mean = mean_loss(loss, windows, 100, weight.device)
    assert mean == pytest.approx(float(outputs.square().mean()), rel=1e-5)
    halvings = {7: [], 4: [3], 1: [3, 1]}[most]
    assert [record.args[1] for record in caplog.records] == 2 * halvings  # type: ignore[index]
    with pytest.raises(torch.OutOfMemoryError):
        backward(lambda part: never(), windows, optimizer, weight.device)


def never() -> Tensor:
    raise torch.OutOfMemoryError("too large")
