"""An LM head in 8 bits, chosen at load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from native_layers import needs_library

from trim_export.artifact import Artifact
from trim_export.errors import UsageError
from trim_export.runtimes import load, tensor_bytes
from trim_export.runtimes.native import QuantizedEmbedding, QuantizedLinear

pytestmark = needs_library
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.mark.parametrize("runtime", ["native", "dense"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_logits_are_those_of_a_head_rounded_to_eight_bits(
    pruned: Callable[..., Artifact], runtime: str, kind: str
) -> None:
    path = pruned(kind).path
    stored, small = load(path, runtime), load(path, runtime, lm_head="int8")
    head = small.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    rounded = head.weight.float() * head.scales[:, None]
    weight = stored.get_output_embeddings().weight
    assert ((rounded - weight).abs() <= 0.5001 * head.scales[:, None]).all()
    tied = weight.data_ptr() == stored.get_input_embeddings().weight.data_ptr()
    assert isinstance(small.get_input_embeddings(), QuantizedEmbedding) == tied
    with torch.inference_mode():
        weight.copy_(rounded)
        torch.testing.assert_close(small(TOKENS).logits, stored(TOKENS).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(small(TOKENS[:, :1]).logits, stored(TOKENS[:, :1]).logits, rtol=1e-4, atol=1e-4)
    assert small.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 8)
    assert tensor_bytes(small) < tensor_bytes(stored)


def test_it_is_not_saved_and_an_unknown_form_is_refused(pruned: Callable[..., Artifact], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="8-bit LM head is not what was stored"):
        load(pruned("llama").path, "native", lm_head="int8").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="unknown LM head 'int4'"):
        load(pruned("llama").path, "native", lm_head="int4")
