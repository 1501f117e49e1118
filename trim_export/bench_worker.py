"""One contestant of `trim_export.bench`: load a model, then answer requests on standard input, a JSON line each."""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trim_export.cuda import record
from trim_export.decoding import GrowingDecoder, RecordedDecoder, make_decoder
from trim_export.models import DTYPES, quiet_transformers
from trim_export.runtimes import load, tensor_bytes
from trim_export.runtimes.onnxruntime import OnnxCausalLM

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
    dtype, device = DTYPES.get(settings["dtype"]), settings["device"]  # an ONNX model has its own
    forms = {form: settings[form] for form in ("lm_head", "values")}
    model = load(settings["directory"], settings["runtime"], dtype, device, **forms)
    load_s = time.perf_counter() - begin
    decoders: Decoders = {}
    _answer({})
    for line in sys.stdin:
        request = json.loads(line)
        if "memory" in request:
            memory = {"weight_bytes": _weight_bytes(model), "peak_memory_bytes": _peak(model), "load_s": load_s}
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


def _weight_bytes(model: PreTrainedModel) -> int:
    return model.weight_bytes if isinstance(model, OnnxCausalLM) else tensor_bytes(model)


def _peak(model: PreTrainedModel) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux lets a process begin with the peak of the one that started it; only the line VmHWM is its own.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return (own or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def _answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
