"""Input statistics of small modules against their definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trim_export.errors import ModelError
from trim_export.statistics import InputStatistics, collect_inputs, input_statistics

FEATURES, INNER = 6, 10
NAMES = ["q", "k", "v", "o", "up", "down"]


class Block(nn.Module):
    """q, k, v read one tensor; o, up and down one each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(FEATURES, FEATURES) for _ in range(4))
        self.up, self.down = nn.Linear(FEATURES, INNER), nn.Linear(INNER, FEATURES)

    def inputs(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """What each layer reads, computed without any hook."""
        normed = 2 * hidden_states
        mixed = self.q(normed) * self.k(normed) + self.v(normed)
        after = self.o(mixed) + hidden_states
        return {"q": normed, "k": normed, "v": normed, "o": mixed, "up": after, "down": self.up(after).relu()}

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = 2 * hidden_states
        mixed = self.q(normed) * self.k(normed) + self.v(normed)
        after = self.o(mixed) + hidden_states
        return self.down(self.up(after).relu())


class FlatBlock(nn.Module):
    """Flattens windows and tokens before its layer, as OPT does before its MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, INNER)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.up(hidden_states.reshape(-1, FEATURES)).view(*hidden_states.shape[:2], INNER)


def hidden(windows: int = 7, tokens: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(windows, tokens, FEATURES, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def collect(
    block: nn.Module, states: Tensor, batch: int = 3, call: Callable[[Tensor], object] | None = None
) -> dict[str, InputStatistics]:
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}

    def run() -> None:
        for part in states.split(batch):
            (call or block)(part)

    return collect_inputs(block, linears, run, "model.layers.3")


def assert_is(statistics: InputStatistics, inputs: Tensor) -> None:
    """``inputs`` are ``[windows, tokens, columns]``."""
    inputs = inputs.detach().double()
    expected = inputs.square().sum(dim=(0, 1)) / len(inputs)
    torch.testing.assert_close(statistics.mean_square.double(), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(statistics.last_tokens.double(), inputs[:, -1].T, rtol=1e-5, atol=1e-6)
    assert statistics.mean_square.dtype == statistics.last_tokens.dtype == torch.float32
    assert statistics.last_tokens.is_contiguous()


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("name", NAMES)
def test_sums_run_over_all_tokens_and_last_tokens_over_all_windows(name: str, batch: int) -> None:
    block = Block()
    assert_is(collect(block, hidden(), batch)[name], block.inputs(hidden())[name])


def test_inputs_at_hand_give_the_same_statistics() -> None:
    assert_is(input_statistics(hidden(), "lm_head"), hidden())


def test_inputs_at_hand_that_are_not_finite_are_named() -> None:
    with pytest.raises(ModelError, match=r"^lm_head: NaN or infinity"):
        input_statistics(hidden() / 0, "lm_head")


@pytest.mark.parametrize("batch", [1, 3])
def test_windows_are_found_again_in_flattened_inputs(batch: int) -> None:
    assert_is(collect(FlatBlock(), hidden(), batch)["up"], hidden())


def test_windows_of_one_token_are_windows() -> None:
    assert_is(collect(FlatBlock(), hidden(tokens=1))["up"], hidden(tokens=1))


def test_hidden_states_may_come_by_name() -> None:
    block = Block()
    by_name = collect(block, hidden(), call=lambda states: block(hidden_states=states))
    assert_is(by_name["down"], block.inputs(hidden())["down"])


def test_half_precision_inputs_are_summed_in_float32() -> None:
    states = (100 * hidden()).half()
    assert_is(collect(FlatBlock().half(), states)["up"], states)
    assert states.float().square().sum(dim=(0, 1)).max() > torch.finfo(torch.float16).max


def test_layers_that_read_one_tensor_share_one_result() -> None:
    results = collect(Block(), hidden())
    assert results["q"] is results["k"] is results["v"]


def test_a_tensor_that_is_sent_through_twice_counts_twice() -> None:
    block, states = nn.Sequential(nn.Linear(FEATURES, 2)), hidden()

    def twice(part: Tensor) -> None:
        block(part)
        block(part)

    assert_is(collect(block, states, batch=7, call=twice)["0"], states.repeat(2, 1, 1))


def test_layers_that_read_equal_but_other_tensors_do_not_share() -> None:
    results = collect(Block(), hidden())
    assert results["o"] is not results["q"]
    assert results["up"] is not results["o"]


def test_results_do_not_change_when_inputs_are_overwritten() -> None:
    states = hidden()

    def overwrite(part: Tensor) -> None:
        block(part)
        part.zero_()

    block = FlatBlock()
    assert_is(collect(block, states.clone(), call=overwrite)["up"], states)


def test_hooks_are_gone_afterwards_even_after_a_failure() -> None:
    block = Block()
    collect(block, hidden())
    with pytest.raises(ZeroDivisionError):
        collect(block, hidden(), call=lambda _: 1 / 0)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_only_the_layers_asked_for_are_watched() -> None:
    block = Block()
    results = collect_inputs(block, {"mlp.down": block.down}, lambda: block(hidden()), "b")
    assert list(results) == ["mlp.down"]
    assert_is(results["mlp.down"], block.inputs(hidden())["down"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [0, 4])
def test_inputs_that_are_not_finite_are_named_with_block_and_layer(value: float, token: int) -> None:
    states = hidden()
    states[2, token, 1] = value
    with pytest.raises(ModelError, match=r"^model\.layers\.3\.q: NaN or infinity in its calibration inputs"):
        collect(Block(), states)


def test_the_layer_where_it_begins_is_the_one_named() -> None:
    block = Block()
    block.up.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"^model\.layers\.3\.down: NaN or infinity"):
        collect(block, hidden())


def test_a_layer_that_never_runs_is_named() -> None:
    block = FlatBlock()
    block.expert = nn.Linear(FEATURES, 2)
    with pytest.raises(ModelError, match=r"^model\.layers\.3: expert saw no calibration input"):
        collect(block, hidden())


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_gram_matrices_are_gathered_when_asked_for(batch: int) -> None:
    block, states = Block(), hidden()
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}

    @torch.no_grad()
    def run() -> None:
        for part in states.split(batch):
            block(part)

    found = collect_inputs(block, linears, run, "block", grams=True)
    for name, inputs in block.inputs(states).items():
        rows = inputs.detach().double().flatten(0, 1)
        gram = found[name].gram
        assert gram is not None
        torch.testing.assert_close(gram.double(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert found["q"].gram is found["v"].gram
    assert all(statistics.gram is None for statistics in collect(block, states).values())
