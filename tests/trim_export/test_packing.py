"""Joined calibration windows: nothing lost, and read by the model as the texts they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_tokens

from trim_export.forward import block_calls, choose_compute, embed, run_block
from trim_export.models import DenseModel, decoder_blocks, load_model
from trim_export.packing import BEGINNING, pack_windows, read_apart, unpacked

COMPUTE = choose_compute("cpu", torch.float32)
Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def llama(tiny: Tiny) -> DenseModel:
    return load_model(str(tiny("llama")))


@given(windows=st.integers(1, 40), length=st.integers(1, 50), context=st.integers(1, 300))
def test_every_window_is_there_in_order_and_no_sequence_is_longer_than_asked(
    llama: DenseModel, windows: int, length: int, context: int
) -> None:
    tokens = torch.arange(windows * length).view(windows, length)
    packed = pack_windows(tokens, context, llama.model)
    assert torch.equal(packed.tokens.flatten(), tokens.flatten())
    assert packed.tokens.shape == (windows // packed.joined, packed.joined * length)
    limit = min(context, llama.model.config.max_position_embeddings)
    assert packed.joined == 1 or packed.joined * length <= limit
    if packed.positions is not None:
        steps = packed.positions[0].diff()
        assert set(steps.tolist()) <= {1, 1 - BEGINNING}
        beginnings = int((packed.positions == 0).sum()) - 1
        assert 0 < beginnings * BEGINNING <= packed.tokens.shape[1] / 8


def test_nothing_is_joined_unless_asked(llama: DenseModel) -> None:
    packed = pack_windows(tiny_tokens(8, 16), 0, llama.model)
    assert packed.joined == 1
    assert packed.positions is None


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt-neox", "gemma3"])
def test_texts_of_a_sequence_do_not_see_each_other(tiny: Tiny, kind: str) -> None:
    model = load_model(str(tiny(kind))).model
    blocks = list(decoder_blocks(model).values())
    packed = pack_windows(tiny_tokens(8, 16), 32, model)
    assert packed.positions is not None
    calls = block_calls(model, blocks, packed.tokens[:1], packed.positions, packed.joined)
    assert read_apart(calls, packed.positions)
    hidden = embed(model, blocks, packed.tokens, packed.positions)
    for block, call in zip(blocks, calls, strict=True):
        hidden = run_block(block, call, hidden, COMPUTE)
    begins = [*(packed.positions[0] == 0).nonzero().flatten().tolist(), packed.tokens.shape[1]]
    for begin, end in itertools.pairwise(begins):
        text = packed.tokens[:, begin:end]
        alone_calls = block_calls(model, blocks, text[:1])
        alone = embed(model, blocks, text)
        for block, call in zip(blocks, alone_calls, strict=True):
            alone = run_block(block, call, alone, COMPUTE)
        torch.testing.assert_close(hidden[:, begin:end], alone, rtol=1e-3, atol=1e-4)


def test_a_model_that_would_mix_the_texts_is_found_out(tiny: Tiny) -> None:
    model = load_model(str(tiny("opt"))).model  # learned positions; it never looks where a text begins
    blocks = list(decoder_blocks(model).values())
    packed = pack_windows(tiny_tokens(8, 16), 32, model)
    assert packed.positions is not None
    assert not read_apart(block_calls(model, blocks, packed.tokens[:1], packed.positions), packed.positions)
    assert unpacked(tiny_tokens(8, 16)).positions is None
