"""Block by block, a model computes what it computes as a whole."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, UNPRUNABLE, tiny_model, tiny_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from trim_export import forward
from trim_export.errors import EnvironmentLacks
from trim_export.forward import Compute, batch_windows, block_calls, choose_compute, embed, run_block
from trim_export.models import decoder_blocks

EXACT = Compute(torch.device("cpu"), autocast=False)
LENGTH = 12

FINAL_NORM = {"opt": "decoder.final_layer_norm", "gpt-neox": "final_layer_norm", "gpt2": "ln_f"}


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
    norm = model.base_model.get_submodule(FINAL_NORM.get(kind, "norm"))
    with torch.no_grad():
        whole = model.base_model(tokens, output_hidden_states=True, use_cache=False)
        ours = [*inputs, norm(last)]
    assert len(ours) == len(whole.hidden_states)
    for mine, theirs in zip(ours, whole.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[-1], whole.last_hidden_state, rtol=1e-5, atol=1e-5)


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
    advanced: list[None] = []
    calls = block_calls(model, blocks, tiny_tokens(1, LENGTH))
    hidden = embed(model, blocks, tiny_tokens(5, LENGTH))
    blocks[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    run_block(blocks[0], calls[0], hidden, EXACT, advance=lambda: advanced.append(None))
    assert sizes == [2, 2, 1]
    assert len(advanced) == 3
    assert batch_windows(LENGTH) == 2
    assert batch_windows(1000) == 1


def test_no_hook_is_left_behind_even_after_an_error() -> None:
    model = tiny_model("llama")
    blocks = list(decoder_blocks(model).values())
    with pytest.raises(IndexError):
        embed(model, blocks, torch.full((1, 4), 10_000))
    with pytest.raises(IndexError):
        block_calls(model, blocks, torch.full((1, 4), 10_000))
    embed(model, blocks, tiny_tokens())
    block_calls(model, blocks, tiny_tokens(1))
    assert not any(module._forward_pre_hooks for module in model.modules())


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
    class Block(nn.Module):
        def forward(self, hidden: Tensor, scale: Tensor) -> tuple[Tensor, str]:
            return hidden * scale, "attention weights"

    call = forward.BlockCall((), {"scale": torch.tensor(3.0)})
    hidden = torch.ones(2, 4, 8)
    assert torch.equal(run_block(Block(), call, hidden, EXACT), 3 * hidden)


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
