"""Block by block, a model computes what it computes as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, UNPRUNABLE, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from trim_export import forward
from trim_export.errors import EnvironmentLacks
from trim_export.forward import (
    BlockCall,
    Compute,
    batch_windows,
    block_calls,
    choose_compute,
    embed,
    finish_forward,
    run_block,
)
from trim_export.models import decoder_blocks
from trim_export.statistics import observe_block

EXACT = Compute(torch.device("cpu"), autocast=False)
LENGTH = 12


def by_blocks(model: PreTrainedModel, tokens: Tensor, compute: Compute = EXACT) -> list[Tensor]:
    """The inputs of every block, and the output of the last."""
    blocks = list(decoder_blocks(model).values())
    calls = block_calls(model, blocks, tokens[:1])
    hidden = [embed(model, blocks, tokens)]
    for block, call in zip(blocks, calls, strict=True):
        hidden.append(run_block(block, call, hidden[-1], compute))
    return hidden


@pytest.mark.parametrize("tokens_per_batch", [4096, 2 * LENGTH, 1])
@pytest.mark.parametrize("kind", [*ARCHITECTURES, *UNPRUNABLE])
def test_blocks_in_turn_make_the_models_hidden_states(
    kind: str, tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", tokens_per_batch)
    model = tiny_model(kind)
    tokens = tiny_tokens(5, LENGTH)
    *inputs, last = by_blocks(model, tokens)
    blocks = list(decoder_blocks(model).values())
    finished = finish_forward(model, blocks, block_calls(model, blocks, tokens[:1]), tokens, last)
    with torch.no_grad():
        whole = model.base_model(tokens, output_hidden_states=True, use_cache=False)
    assert len(inputs) + 1 == len(whole.hidden_states)
    for ours, theirs in zip([*inputs, finished], whole.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(finished, whole.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_finishing_takes_what_it_is_given_and_leaves_the_blocks_as_they_were() -> None:
    model = tiny_model("llama")
    tokens = tiny_tokens(2, LENGTH)
    blocks = list(decoder_blocks(model).values())
    calls = block_calls(model, blocks, tokens[:1])
    before = by_blocks(model, tokens)
    given = torch.randn(2, LENGTH, 32)
    assert torch.equal(finish_forward(model, blocks, calls, tokens, given), model.model.norm(given))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(by_blocks(model, tokens), before, strict=True))


def test_gemma3_calls_differ_between_sliding_and_global_blocks() -> None:
    # Otherwise the test above would not notice one call's arguments used for all blocks.
    model = tiny_model("gemma3")
    blocks = list(decoder_blocks(model).values())
    calls = block_calls(model, blocks, tiny_tokens(1, LENGTH))
    hidden = embed(model, blocks, tiny_tokens(2, LENGTH))
    own, foreign = (run_block(blocks[0], call, hidden, EXACT) for call in calls[:2])
    assert not torch.allclose(own, foreign, atol=1e-3)


def test_batches_have_the_expected_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", 2 * LENGTH)
    model = tiny_model("llama")
    blocks = list(decoder_blocks(model).values())
    sizes: list[int] = []
    calls = block_calls(model, blocks, tiny_tokens(1, LENGTH))
    hidden = embed(model, blocks, tiny_tokens(5, LENGTH))
    blocks[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    run_block(blocks[0], calls[0], hidden, EXACT)
    assert sizes == [2, 2, 1]
    assert batch_windows(LENGTH) == 2
    assert batch_windows(1000) == 1


class Scarce(nn.Module):
    """A block on a device whose memory holds only so many windows.

    Attributes:
        sizes: windows of every batch that it was asked to take.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.sizes: list[int] = []
        self.up = nn.Linear(6, 6)
        self.down = nn.Linear(6, 6)

    def forward(self, hidden: Tensor) -> Tensor:
        self.sizes.append(len(hidden))
        inner = self.up(hidden)
        if len(hidden) > self.most:  # after one layer has run
            raise torch.OutOfMemoryError("too large")
        output: Tensor = self.down(inner)
        return output


@pytest.mark.parametrize(("most", "tried"), [(8, 8), (5, 4), (1, 1)])
def test_out_of_memory_makes_smaller_batches_and_says_so(
    most: int, tried: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", 8 * LENGTH)
    block, hidden, call = Scarce(most), torch.randn(9, LENGTH, 6), BlockCall((), {}, False)
    linears = {"up": block.up, "down": block.down}
    statistics, output = observe_block(block, linears, call, hidden, EXACT, "block")
    torch.testing.assert_close(output, block.down(block.up(hidden)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(run_block(block, call, hidden, EXACT), output, rtol=0, atol=0)
    # The attempts that failed have left no trace in the sums.
    for name, seen in (("up", hidden), ("down", block.up(hidden))):
        expected = seen.double().square().sum(dim=(0, 1)) / len(hidden)
        torch.testing.assert_close(statistics[name].mean_square.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(statistics[name].last_tokens, seen[:, -1].T, rtol=1e-6, atol=1e-6)
    assert max(size for size in block.sizes if size <= most) == tried
    if most < 8:
        assert f"cpu is out of memory: trying again with {tried} windows at a time" in caplog.text
    else:
        assert caplog.text == ""


def test_out_of_memory_for_a_single_window_is_passed_on() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run_block(Scarce(0), BlockCall((), {}, False), torch.randn(3, LENGTH, 6), EXACT)


def test_no_hook_is_left_behind_even_after_an_error() -> None:
    model = tiny_model("llama")
    blocks = list(decoder_blocks(model).values())
    with pytest.raises(IndexError):
        embed(model, blocks, torch.full((1, 4), 10_000))
    with pytest.raises(IndexError):
        block_calls(model, blocks, torch.full((1, 4), 10_000))
    embed(model, blocks, tiny_tokens())
    block_calls(model, blocks, tiny_tokens(1))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_nothing_records_gradients() -> None:
    model = tiny_model("llama").requires_grad_(True)
    assert not any(hidden.requires_grad for hidden in by_blocks(model, tiny_tokens()))


def test_autocast_multiplies_in_bfloat16_and_returns_float32() -> None:
    model = tiny_model("llama")
    seen: list[torch.dtype] = []
    decoder_blocks(model)["model.layers.0"].get_submodule("mlp.down_proj").register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    exact = by_blocks(model, tiny_tokens(2, LENGTH))
    seen.clear()
    rough = by_blocks(model, tiny_tokens(2, LENGTH), Compute(torch.device("cpu"), autocast=True))
    assert seen[-1] == torch.bfloat16
    assert rough[-1].dtype == torch.float32
    assert not torch.equal(rough[-1], exact[-1])
    torch.testing.assert_close(rough[-1], exact[-1], rtol=0.1, atol=0.1 * float(exact[-1].std()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    hidden = by_blocks(tiny_model("llama", dtype), tiny_tokens())
    assert {state.dtype for state in hidden} == {dtype}


def test_blocks_that_return_tuples() -> None:
    class Wrapped(nn.Module):
        """A block as transformers 4 had them: attention weights, caches and the like come along."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor, **rest: Any) -> tuple[Tensor, None]:
            return self.inner(hidden, **rest), None

    class Layers(nn.ModuleList):
        def __iter__(self) -> Iterator[Any]:
            return iter([lambda *args, block=block, **rest: block(*args, **rest)[0] for block in super().__iter__()])

    model, tokens = tiny_model("llama"), tiny_tokens(3, LENGTH)
    expected = by_blocks(model, tokens)
    blocks = [Wrapped(block) for block in model.model.layers]
    model.model.layers = Layers(blocks)
    calls = block_calls(model, blocks, tokens[:1])
    assert all(call.gives_tuple for call in calls)
    hidden = expected[0]
    for block, call, after in zip(blocks, calls, expected[1:], strict=True):
        hidden = run_block(block, call, hidden, EXACT)
        assert torch.equal(hidden, after)
    assert torch.equal(finish_forward(model, blocks, calls, tokens, hidden), model.model.norm(hidden))


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentLacks, match=r"^no CUDA device here .*; use --device cpu$") as caught:
        choose_compute("cuda", torch.float32)
    assert caught.value.exit_code == 3
    assert choose_compute("auto", torch.float32).device.type == "cpu"


@pytest.mark.parametrize("fast", [True, False])
def test_autocast_only_for_float32_on_a_processor_that_gains(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    assert choose_compute("cpu", torch.float32) == Compute(torch.device("cpu"), fast)
    assert choose_compute("cpu", torch.bfloat16) == Compute(torch.device("cpu"), False)
