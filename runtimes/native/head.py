"""LM head and embedding in 8 bits: on a small model most of what pruning left."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from trim_export.converters.int8 import quantize_weight
from trim_export.errors import EnvironmentLacks, UsageError
from trim_export.runtimes.native.dense import QuantizedEmbedding, QuantizedLinear
from trim_export.runtimes.native.library import library

__all__ = ["quantize_head"]


def quantize_head(model: PreTrainedModel) -> None:
    """Hold the LM head of a loaded model, and the embedding where it is the same tensor, as int8 with row scales.

    Changes what the model computes; nothing is written to the artifact.

    Raises:
        UsageError: the head was pruned, or there is none.
        EnvironmentLacks: the native library is not installed.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if library() is None:
        raise EnvironmentLacks("an 8-bit LM head needs the native library; install a C++ compiler and then trim-export")
    if not isinstance(head, nn.Linear) or not head.weight.is_cpu:
        raise UsageError("only a dense LM head on the CPU can be held in 8 bits; leave --lm-head out")
    weight, scales = quantize_weight(head.weight)
    shared = type(embedding) is nn.Embedding and embedding.weight.data_ptr() == head.weight.data_ptr()
    model.set_output_embeddings(QuantizedLinear(weight, scales, head.bias))
    if shared:
        model.set_input_embeddings(QuantizedEmbedding(weight, scales, head.weight.dtype))
