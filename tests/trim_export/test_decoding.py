"""Decoding with a fixed cache, and replaying one recorded step: what a CUDA graph does, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from trim_export.artifact import Artifact
from trim_export.cuda import Recorder, record
from trim_export.decoding import GrowingDecoder, RecordedDecoder, make_decoder
from trim_export.runtimes import load
from trim_export.runtimes.triton import TritonRuntime

BATCH, PROMPT, STEPS = 2, 9, 8


class Recording(TorchDispatchMode):
    """Notes every operator with its very tensors, and does them again in the same memory: a graph without a GPU.

    As with a graph, Python does not run again, so a number that it computed stays what it was, and nothing may wait for
    a value to come to the host. Work is done while it is recorded, which a graph does not.
    """

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.item.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def rerun(work: Callable[[], object]) -> Callable[[], object] | None:
    """As `trim_export.cuda.record`, without a GPU."""
    try:
        with Recording() as recording:
            work()
    except RuntimeError:
        return None
    return recording.replay


def prompts(seed: int = 0) -> Tensor:
    return tiny_tokens(BATCH, PROMPT, seed)


@torch.inference_mode()
def continuation(decoder: GrowingDecoder | RecordedDecoder, tokens: Tensor) -> Tensor:
    decoder.prefill(tokens)
    return torch.cat([decoder.step().clone() for _ in range(STEPS)], dim=1)


@torch.inference_mode()
def greedy(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """By reading everything again for each token, without a cache."""
    for _ in range(STEPS):
        tokens = torch.cat((tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return tokens[:, -STEPS:]


@pytest.mark.parametrize("recorder", [None, rerun])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_decoded_is_what_the_model_says_without_a_cache(kind: str, recorder: Recorder | None) -> None:
    model = tiny_model(kind)
    with torch.inference_mode():
        decoder = make_decoder(model, prompts(2), STEPS, recorder)
    for seed in (0, 1):  # a decoder is used again
        assert torch.equal(continuation(decoder, prompts(seed)), greedy(model, prompts(seed)))
    # OPT reads on the host how much its cache holds; sliding windows count there.
    assert isinstance(decoder, RecordedDecoder) == (recorder is not None and kind not in ("opt", "gemma3", "mistral"))


def test_the_layers_for_gpus_can_be_recorded(
    pruned: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TritonRuntime, "devices", ("cpu",))
    monkeypatch.setattr(TritonRuntime, "unavailable", lambda self: None)
    path = pruned("llama").path
    with torch.inference_mode():
        decoder = make_decoder(load(path, "triton"), prompts(2), STEPS, rerun)
    assert isinstance(decoder, RecordedDecoder)
    assert torch.equal(continuation(decoder, prompts()), greedy(load(path, "dense"), prompts()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_decodes_the_same() -> None:
    model = tiny_model("llama").cuda()
    with torch.inference_mode():
        decoder = make_decoder(model, prompts(2).cuda(), STEPS, record)
    assert isinstance(decoder, RecordedDecoder)
    assert torch.equal(continuation(decoder, prompts().cuda()), greedy(model, prompts().cuda()))
