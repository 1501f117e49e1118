"""The dense stream beside the pruned one, against direct float64 sums over what hooks see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from scarce import fails_at
from tiny_models import tiny_tokens

from trim_export import forward, streams
from trim_export.forward import block_calls, choose_compute, embed
from trim_export.models import decoder_blocks, load_model, projections
from trim_export.streams import PrunedStream, observe_dense

COMPUTE = choose_compute("cpu", torch.float32)

GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt-neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}
WRITERS = {
    "llama": ["o_proj", "down_proj"],
    "qwen3": ["o_proj", "down_proj"],
    "opt": ["out_proj", "fc2"],
    "gpt-neox": ["dense", "dense_4h_to_h"],
    "gemma3": [],  # a norm stands between its projections and the residual stream
}


def first_block(tiny: Callable[..., Path], kind: str):  # type: ignore[no-untyped-def]
    model = load_model(str(tiny(kind))).model
    blocks = list(decoder_blocks(model).values())
    tokens = tiny_tokens()
    return blocks[0], block_calls(model, blocks, tokens[:1])[0], embed(model, blocks, tokens)


@pytest.mark.parametrize("kind", GROUPS)
def test_layers_that_share_an_input_are_visited_together_in_order(tiny: Callable[..., Path], kind: str) -> None:
    block, call, hidden = first_block(tiny, kind)
    dense = observe_dense(block, projections(block), call, hidden, COMPUTE)
    names = [sorted(path.rpartition(".")[2] for path in group) for group in dense.flow.groups]
    assert names == [sorted(group) for group in GROUPS[kind]]


@pytest.mark.parametrize("kind", WRITERS)
def test_writers_are_the_layers_that_add_to_the_residual_stream(tiny: Callable[..., Path], kind: str) -> None:
    block, call, hidden = first_block(tiny, kind)
    dense = observe_dense(block, projections(block), call, hidden, COMPUTE)
    assert [path.rpartition(".")[2] for path in dense.flow.writers] == WRITERS[kind]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt-neox", "gemma3"])
def test_sums_are_those_of_the_streams(tiny: Callable[..., Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", 40)  # several batches
    monkeypatch.setattr(streams, "SMALLEST_TILE", 5)  # several tiles of the Gram matrix, of unequal sizes
    block, call, dense_hidden = first_block(tiny, kind)
    hidden = dense_hidden + 0.1 * torch.randn(dense_hidden.shape, generator=torch.Generator().manual_seed(0))
    linears = projections(block)
    original = copy.deepcopy(block)
    dense = observe_dense(block, linears, call, dense_hidden, COMPUTE)
    close = {"rtol": 1e-4, "atol": 1e-4}
    stream = PrunedStream(block, linears, dense, call, hidden, COMPUTE, "block 0")
    for group in dense.flow.groups:
        seen = stream.observe(group)
        sides = {"dense": (original, dense_hidden), "pruned": (block, hidden)}
        inputs = {name: watched_inputs(side, group[0], call, stream) for name, (side, stream) in sides.items()}
        torch.testing.assert_close(seen.gram.double(), inputs["pruned"].T @ inputs["pruned"], **close)
        torch.testing.assert_close(seen.inputs.mean_square, seen.gram.diagonal() / len(hidden))
        assert seen.inputs.last_tokens.shape == (linears[group[0]].in_features, len(hidden))
        weight = linears[group[0]].weight.data
        expected = weight.double() @ inputs["dense"].T @ inputs["pruned"]
        if group[0] in dense.flow.writers:
            before = {
                name: residual_before(side, group[0], dense.flow.writers, call, stream)
                for name, (side, stream) in sides.items()
            }
            expected += (before["dense"] - before["pruned"]).T @ inputs["pruned"]
        torch.testing.assert_close(seen.targets(weight).double(), expected, **close)
        for path in group:  # as a weight update would, before the next group is looked at
            linears[path].weight.data = linears[path].weight.data * 0.9


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_attention_runs_once_for_each_batch_of_the_pruned_stream(tiny: Callable[..., Path], kind: str) -> None:
    block, call, hidden = first_block(tiny, kind)
    linears = projections(block)
    dense = observe_dense(block, linears, call, hidden, COMPUTE)
    stream = PrunedStream(block, linears, dense, call, hidden, COMPUTE, "block 0")
    attention = torch.nn.functional.scaled_dot_product_attention
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", side_effect=attention) as ran:
        for group in dense.flow.groups:
            stream.observe(group)
    assert ran.call_count == 1


def test_equal_streams_ask_for_the_dense_layer(tiny: Callable[..., Path]) -> None:
    block, call, hidden = first_block(tiny, "opt")  # its layers have biases
    linears = projections(block)
    dense = observe_dense(block, linears, call, hidden, COMPUTE)
    for group in dense.flow.groups:
        seen = PrunedStream(block, linears, dense, call, hidden, COMPUTE, "block 0").observe(group)
        weight = linears[group[0]].weight.data
        torch.testing.assert_close(seen.targets(weight), weight @ seen.gram, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt", "gemma3"])
def test_the_output_has_the_bits_of_a_pass_through_the_block(tiny: Callable[..., Path], kind: str) -> None:
    block, call, hidden = first_block(tiny, kind)
    linears = projections(block)
    dense = observe_dense(block, linears, call, hidden, COMPUTE)
    stream = PrunedStream(block, linears, dense, call, hidden, COMPUTE, "block 0")
    stream.observe(dense.flow.groups[-1])
    last = linears[dense.flow.groups[-1][0]]
    last.weight.data = last.weight.data * 0.5
    assert torch.equal(stream.finish(), forward.run_block(block, call, hidden, COMPUTE))


@pytest.mark.parametrize(("kind", "ran"), [("llama", 0), ("gemma3", 1)])
def test_only_a_norm_after_the_last_layer_takes_another_pass(tiny: Callable[..., Path], kind: str, ran: int) -> None:
    block, call, hidden = first_block(tiny, kind)
    linears = projections(block)
    dense = observe_dense(block, linears, call, hidden, COMPUTE)
    stream = PrunedStream(block, linears, dense, call, hidden, COMPUTE, "block 0")
    stream.observe(dense.flow.groups[-1])
    with mock.patch.object(block, "forward", side_effect=block.forward) as passes:
        stream.finish()
    assert passes.call_count == ran


def walk(block, call, streams, failing=None, at=1):  # type: ignore[no-untyped-def]
    """What a block's two streams give, its layers halved one group after the other; one pass runs out of memory.

    ``failing`` is "dense", the place of a group of layers, or "finish"; ``at`` the batch at which it fails.
    """
    block = copy.deepcopy(block)
    linears = projections(block)
    last = list(linears.values())[-1]

    def disturbed(step, layer):  # type: ignore[no-untyped-def]
        return fails_at(layer, at) if step == failing else nullcontext()

    with disturbed("dense", last):
        dense = observe_dense(block, linears, call, streams[0], COMPUTE)
    stream = PrunedStream(block, linears, dense, call, streams[1], COMPUTE, "block 0")
    found = {"dense": dense.output} | dense.inputs | {f"after {path}": total for path, total in dense.sums.items()}
    for place, group in enumerate(dense.flow.groups):
        with disturbed(place, linears[group[0]]):
            seen = stream.observe(group)
        found |= {
            f"{place} gram": seen.gram,
            f"{place} targets": seen.targets(linears[group[0]].weight.data),
            f"{place} power": seen.inputs.mean_square,
            f"{place} last tokens": seen.inputs.last_tokens,
        }
        for path in group:
            linears[path].weight.data = linears[path].weight.data * 0.5
    with disturbed("finish", last):
        found["pruned"] = stream.finish()
    return found


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("failing", ["dense", 0, 1, 2, 3, "finish"])
@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3"])
def test_out_of_memory_leaves_no_trace_in_either_stream(
    tiny: Callable[..., Path], kind: str, failing: str | int, at: int,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(forward, "TOKENS_PER_BATCH", 24)  # two batches of the three windows
    block, call, dense_hidden = first_block(tiny, kind)
    hidden = dense_hidden + 0.1 * torch.randn(dense_hidden.shape, generator=torch.Generator().manual_seed(0))
    expected = walk(block, call, (dense_hidden, hidden))
    assert caplog.text == ""
    found = walk(block, call, (dense_hidden, hidden), failing, at)
    assert caplog.text.count("cpu is out of memory: trying again with 1 windows at a time") == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if failing == "dense":  # nothing was seen in larger batches: the bits are those of smaller ones
        monkeypatch.setattr(forward, "TOKENS_PER_BATCH", 12)
        torch.testing.assert_close(found, walk(block, call, (dense_hidden, hidden)), rtol=0, atol=0)


def watched_inputs(block, path, call, stream):  # type: ignore[no-untyped-def]
    caught: list[torch.Tensor] = []
    handle = projections(block)[path].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        call.run(block, stream, COMPUTE)
    handle.remove()
    return caught[0].reshape(-1, caught[0].shape[-1]).double()


def residual_before(block, writer, writers, call, stream):  # type: ignore[no-untyped-def]
    """The block's output without what the writer and those after it add."""
    with torch.no_grad():
        output = call.run(block, stream, COMPUTE).reshape(-1, stream.shape[-1]).double()
        for path in writers[writers.index(writer) :]:
            linear = copy.deepcopy(projections(block)[path]).double()
            output -= linear(watched_inputs(block, path, call, stream))
    return output
