"""``python -m trim_export.converters.onnx.traced MODEL OUT [--last-logits]``: any decoder that torch can trace.

Inputs and outputs are named as onnxruntime-genai's model builder names them, so that one runtime serves both:
``input_ids``, ``attention_mask`` and ``past_key_values.N.key|value`` in, ``logits`` and ``present.N.key|value`` out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from trim_export.converters.onnx.graph import MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["main"]

_OPSET = 21
# Sizes of the example: none is 0 or 1, which tracing would take for a constant of the model.
_BATCH, _TOKENS, _PAST = 2, 3, 5


class _Decoder(nn.Module):
    """A model whose key-value cache goes in and out as tensors, with the logits of so many tokens (0: of all)."""

    def __init__(self, model: PreTrainedModel, logits_to_keep: int) -> None:
        super().__init__()
        self.model = model
        self.logits_to_keep = logits_to_keep

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        cache = DynamicCache(ddp_cache_data=past)
        positions = attention_mask.cumsum(-1)[:, -input_ids.shape[1] :] - 1
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self.logits_to_keep,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def main(source: Path, out: Path, logits_to_keep: int = 0) -> None:
    """Export the model in ``source`` with its weights beside the graph, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa").eval()
    sides = _cache_sides(model)
    tokens = torch.ones(_BATCH, _TOKENS, dtype=torch.int64)
    attended = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64)
    past = [
        (torch.zeros(_BATCH, heads, _PAST, width), torch.zeros(_BATCH, heads, _PAST, width)) for heads, width in sides
    ]
    free = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        _Decoder(model, logits_to_keep),
        (tokens, attended, past),
        dynamo=True,
        opset_version=_OPSET,
        input_names=["input_ids", "attention_mask", *_cache_names("past_key_values", len(sides))],
        output_names=["logits", *_cache_names("present", len(sides))],
        dynamic_shapes={
            "input_ids": {0: free, 1: free},
            "attention_mask": {0: free, 1: free},
            "past": [({0: free, 2: free}, {0: free, 2: free})] * len(sides),
        },
    )
    out.mkdir(parents=True, exist_ok=True)
    assert program is not None
    program.save(out / MODEL, external_data=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def _cache_sides(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Heads and width of each layer's keys, as one pass over one token makes them."""
    with torch.inference_mode():
        cache = model(torch.ones(1, 1, dtype=torch.int64), use_cache=True).past_key_values
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), 1 if sys.argv[3:] == ["--last-logits"] else 0)
