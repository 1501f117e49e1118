"""One contestant of `trim_export.bench`: load a model, then answer requests on standard input, a JSON line each."""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from trim_export.cuda import record
from trim_export.decoding import GrowingDecoder, RecordedDecoder, make_decoder
from trim_export.models import DTYPES, quiet_transformers
from trim_export.runtimes import load, tensor_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["main"]

Decoders = dict[tuple[int, ...], GrowingDecoder | RecordedDecoder]
"""By batch, prompt and tokens to generate: recording a step takes longer than many steps."""


@torch.inference_mode()
def main(settings: dict[str, Any]) -> None:
    """Load as ``settings`` say, print ``{}`` when ready, and serve until the input ends."""
    quiet_transformers()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    begin = time.perf_counter()
    dtype, device = DTYPES[settings["dtype"]], settings["device"]
    model = load(settings["directory"], settings["runtime"], dtype, device, lm_head=settings["lm_head"])
    load_s = time.perf_counter() - begin
    decoders: Decoders = {}
    _answer({})
    for line in sys.stdin:
        request = json.loads(line)
        if "memory" in request:
            memory = {"weight_bytes": tensor_bytes(model), "peak_memory_bytes": _peak(model), "load_s": load_s}
            if device == "cuda":
                memory["cuda_graph"] = all(isinstance(decoder, RecordedDecoder) for decoder in decoders.values())
            _answer(memory)
        else:
            _answer(_measure(model, decoders, **request))


def _measure(model: PreTrainedModel, decoders: Decoders, batch: int, prompt: int, generate: int) -> dict[str, Any]:
    """Milliseconds of one prefill and of each of the following decode steps (greedy, with the key-value cache).

    On a GPU a step is a CUDA graph where the model lets itself be recorded.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    key = batch, prompt, generate
    if key not in decoders:
        decoders[key] = make_decoder(model, tokens, generate, record if model.device.type == "cuda" else None)
    decoder = decoders[key]
    marks = [_now(model)]
    decoder.prefill(tokens)
    marks.append(_now(model))
    for _ in range(generate):
        decoder.step()
        marks.append(_now(model))
    spans = [(later - earlier) * 1000 for earlier, later in itertools.pairwise(marks)]
    return {"prefill_ms": spans[0], "decode_ms": spans[1:]}


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak(model: PreTrainedModel) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
