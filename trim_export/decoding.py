"""Greedy decoding step by step, as `trim_export.bench_worker` measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer

from trim_export.cuda import WARM_UPS, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

__all__ = ["GrowingDecoder", "RecordedDecoder", "make_decoder"]


class GrowingDecoder:
    """Reads prompts and continues them, with a cache that grows by each token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.logits = torch.empty(0)
        self.cache: Cache | None = None

    def prefill(self, tokens: Tensor) -> None:
        """Read prompts ``[batch, tokens]``; what was read before is forgotten."""
        output = self.model(tokens, use_cache=True, logits_to_keep=1)
        self.logits, self.cache = output.logits, output.past_key_values

    def step(self) -> Tensor:
        """Take the most likely next token of each sequence, ``[batch, 1]``, and read it."""
        token = self.logits[:, -1:].argmax(-1)
        self.logits = self.model(token, past_key_values=self.cache, use_cache=True).logits
        return token


class RecordedDecoder:
    """The same with a cache of fixed size: every step does the same in the same memory, and is replayed.

    Attributes:
        replay: takes a recorded step; None where a step cannot be recorded, and then nothing can be decoded.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, length: int, recorder: Recorder) -> None:
        """Record a step after prompts like ``tokens``, ``[batch, tokens]``, with room for ``length`` tokens in all."""
        self.model = model
        self.cache = StaticCache(model.config, max_cache_len=length)
        self.logits = torch.empty(0)
        self.token = torch.zeros_like(tokens[:, :1])
        self.replay: Callable[[], object] | None = None
        # Other kinds, as those of sliding windows, count on the host, where a replay does not.
        if all(type(layer) is StaticLayer for layer in self.cache.layers):
            self.logits = self._read(tokens).clone()
            self.replay = recorder(self._advance)

    def prefill(self, tokens: Tensor) -> None:
        """Read prompts ``[batch, tokens]`` of the shape that was recorded; what was read before is forgotten."""
        self.cache.reset()
        self.logits.copy_(self._read(tokens))

    def step(self) -> Tensor:
        """Take the most likely next token of each sequence, ``[batch, 1]``, and read it; valid until the next step."""
        assert self.replay is not None
        self.replay()
        return self.token

    def _advance(self) -> None:
        self.token.copy_(self.logits.argmax(-1))
        self.logits.copy_(self._read(self.token))

    def _read(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, 1, vocabulary]`` after the last token."""
        logits: Tensor = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits


def make_decoder(
    model: PreTrainedModel, tokens: Tensor, generate: int, recorder: Recorder | None = None
) -> GrowingDecoder | RecordedDecoder:
    """What continues prompts like ``tokens``, ``[batch, tokens]``, by so many more; recorded where that is possible."""
    if recorder is not None:
        decoder = RecordedDecoder(model, tokens, tokens.shape[1] + max(generate, WARM_UPS), recorder)
        if decoder.replay is not None:
            return decoder
    return GrowingDecoder(model)
