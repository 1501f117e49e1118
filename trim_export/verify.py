"""Parity: does every runtime compute what the dense model with the same zeros computes?

The reference multiplies the stored weights densely in float32. Each runtime then reads the same prompts whole
(prefill) and token by token through its key-value cache (decode), following the reference's own continuation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trim_export.artifact import Artifact
from trim_export.evaluate import Divergence, divergence
from trim_export.models import dtype_name
from trim_export.patterns import Anywhere, parse_pattern
from trim_export.progress import Track, silently
from trim_export.runtimes import load
from trim_export.runtimes.onnxruntime import read_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PROMPTS", "STORED", "TOLERANCES", "Tolerance", "pattern_holds", "verify", "verify_onnx"]

PROMPTS = (
    "The capital of France is",
    "In 1969, two astronauts walked on the surface of the Moon while a third stayed in orbit above them.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "The recipe needs 250 g of flour, three eggs and a pinch of salt. First, mix the",
    "Question: Why is the sky blue?\nAnswer:",
    "Ein Vogel sitzt auf dem Dach und singt; der Himmel ist",
)
DECODED = 24
"""Tokens that are decoded one by one after each prompt."""


@dataclass(frozen=True)
class Tolerance:
    """What a runtime may differ by; the sums of a product in another order are not the same number."""

    kl: float
    argmax_agreement: float


TOLERANCES = {
    torch.float32: Tolerance(kl=1e-6, argmax_agreement=0.995),
    torch.bfloat16: Tolerance(kl=2e-2, argmax_agreement=0.90),
    torch.float16: Tolerance(kl=1e-3, argmax_agreement=0.97),
}
"""By the dtype that the model computes in. Activations in bfloat16 carry 8 bits, whatever the runtime."""

STORED = {dtype_name(dtype): tolerance for dtype, tolerance in TOLERANCES.items()} | {"int8": Tolerance(0.1, 0.85)}
"""By the dtype that weights were rounded to, of a model that computes in float32."""


@torch.inference_mode()
def verify(
    artifact: Artifact,
    tokenizer: PreTrainedTokenizerBase,
    runtimes: Iterable[str],
    track: Track[Any] = silently,
    values: str = "stored",
) -> dict[str, Any]:
    """Compare runtimes with the dense masked model on real prompts; ``track`` shows progress, model by model.

    With ``values`` in another form than they are stored in, runtimes that can hold them so, and what that may cost.

    Returns:
        ``{"passed": bool, "runtimes": [{"name", "max_abs_diff", "kl", "argmax_agreement", "passed", ...}], "pattern":
        {"name", "passed"}}``.
    """
    results = _compare(
        lambda: load(artifact.path, "dense", dtype=torch.float32),
        artifact.path,
        tokenizer,
        runtimes,
        track,
        STORED.get(values),
        values,
    )
    pattern = {"name": _pattern(artifact), "passed": pattern_holds(artifact)}
    return {
        "passed": pattern["passed"] and all(result["passed"] for result in results),
        "runtimes": results,
        "pattern": pattern,
    }


@torch.inference_mode()
def verify_onnx(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    runtimes: Iterable[str],
    reference: Path | None,
    track: Track[Any] = silently,
) -> dict[str, Any]:
    """Compare an ONNX model's runtimes with the artifact that it was made of, on the same prompts.

    Args:
        directory: with ``model.onnx``.
        tokenizer: of either.
        runtimes: names in `trim_export.runtimes.onnxruntime.EXECUTIONS`.
        reference: the artifact. If None, the model's own functions in standard operators are: they decode what the
            kernels multiply, so the two differ by no more than the order of sums.
        track: shows progress.

    Returns:
        As `verify`, without a pattern.
    """
    form = None if reference is None else read_form(directory)
    stored = {form["values"], form["head"] or "float32"} if isinstance(form, dict) else {"float32"}
    tolerance = max((STORED[name] for name in stored), key=lambda allowed: allowed.kl)

    def load_reference() -> PreTrainedModel:
        if reference is None:
            return load(directory, "onnxruntime-functions")
        return load(reference, "dense", dtype=torch.float32)

    results = _compare(load_reference, directory, tokenizer, runtimes, track, tolerance)
    return {"passed": all(result["passed"] for result in results), "runtimes": results}


def _compare(
    load_reference: Callable[[], PreTrainedModel],
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    runtimes: Iterable[str],
    track: Track[Any],
    tolerance: Tolerance | None = None,
    values: str = "stored",
) -> list[dict[str, Any]]:
    """What each runtime makes of the prompts and the reference's continuations; one model is in memory at a time."""
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in PROMPTS]
    reference = load_reference()
    texts = [(_continue(reference, prompt), len(prompt)) for prompt in track(prompts, "reference: writing")]
    expected = [_logits(reference, *text) for text in track(texts, "reference: reading")]
    del reference
    results = []
    for name in runtimes:
        gc.collect()
        model = load(directory, name, values=values)
        given = [_logits(model, *text) for text in track(texts, f"{name}: reading")]
        results.append(_judge(name, model.dtype, expected, given, tolerance or TOLERANCES[model.dtype]))
        del model
    return results


def pattern_holds(artifact: Artifact) -> bool:
    """Whether every matrix, the LM head too, has the pattern that the artifact was pruned to."""
    pattern = parse_pattern(_pattern(artifact))
    if isinstance(pattern, Anywhere):
        return True
    return all(
        pattern.misfit(*matrix.shape) is None and pattern.holds(matrix.mask) for _, matrix in artifact.matrices()
    )


def _pattern(artifact: Artifact) -> str:
    return str(artifact.manifest["run"]["recipe"].get("pattern", "none"))  # written by versions before patterns: none


def _continue(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """The prompt and its greedy continuation of `DECODED` tokens."""
    text: Tensor = model.generate(  # type: ignore[operator]
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=False,
        min_new_tokens=DECODED,
        max_new_tokens=DECODED,
        pad_token_id=0,
    )
    return text[0]


def _logits(model: PreTrainedModel, sequence: Tensor, prompt: int) -> Tensor:
    """float32 ``[tokens, vocabulary]``: the prompt in one pass, then one token at a time with the cache."""
    output = model(sequence[None, :prompt], use_cache=True)
    pieces = [output.logits[0]]
    for position in range(prompt, len(sequence)):
        output = model(sequence[None, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits[0])
    return torch.cat(pieces).float()


def _judge(
    name: str, dtype: torch.dtype, expected: Sequence[Tensor], given: Sequence[Tensor], tolerance: Tolerance
) -> dict[str, Any]:
    found: Divergence = divergence(torch.cat(list(expected)), torch.cat(list(given)))
    passed = found.kl <= tolerance.kl and found.argmax_agreement >= tolerance.argmax_agreement
    return {
        "name": name,
        "dtype": dtype_name(dtype),
        **asdict(found),
        "tolerance": asdict(tolerance),
        "passed": passed,
    }
