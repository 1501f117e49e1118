"""Structured pruning side by side, and with unstructured pruning on top of it, on SmolLM2-135M.

    python -m benchmarks.structured --calibration wikitext2_valid.txt --data wikitext2_test.txt

Every method removes a fifth of the parameters; FLAP, which can, removes exactly as many as the others do in whole
blocks. Random removal is drawn five times. Then a tenth is removed and the rest pruned at 70 %, against pruning alone
at the sparsity that leaves as many weights. Perplexity on the first 8 windows of 1024 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from trim_export.calibration import calibration_windows, consecutive_windows, read_text, token_stream
from trim_export.evaluate import perplexity
from trim_export.forward import choose_compute
from trim_export.models import DenseModel, decoder_blocks, load_model, quiet_transformers
from trim_export.prune import prune
from trim_export.recipe import make_recipe
from trim_export.structured import STRUCTURED, reduce_model

RESULTS = Path(__file__).parent / "results" / "structured.json"
MODEL = "smollm2-135m"
REMOVE = 0.2
DRAWS = 5
COMBINED = 0.1, 0.7


def main() -> None:
    """Measure whatever is not in the results yet, and write each figure as soon as it is there."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--calibration", required=True)
    options.add_argument("--data", required=True)
    given = options.parse_args()
    quiet_transformers()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    dense = load_model(MODEL)
    tokens = calibration_windows(given.calibration, dense.model, dense.tokenizer, 128, 128, 0)
    stream = token_stream(read_text(given.data, 8 * 1024), dense.tokenizer)
    windows = consecutive_windows(stream, 1024, 8)
    seeds = [("random", seed) for seed in range(DRAWS)]
    for name, seed in [("last", 0), *seeds, ("shortgpt", 0), ("flap", 0), ("pip", 0)]:
        key = f"{name}, seed {seed}"
        if key not in results:
            share = REMOVE if name != "flap" else results["last, seed 0"]["share"]
            results[key] = removed(name, share, seed, tokens, windows)
            save(results)
    for key, share, sparsity in combinations():
        if key not in results:
            results[key] = combined(share, sparsity, tokens, windows)
            save(results)


def combinations() -> list[tuple[str, float, float]]:
    """Structured and unstructured together, and unstructured alone with as many weights left in the blocks."""
    dense = load_model(MODEL)
    present = len(decoder_blocks(dense.model))
    share, sparsity = COMBINED
    STRUCTURED["last"](dense, Tensor(), share, 0, choose_compute("cpu", dense.model.dtype), lambda items, _: items)
    alone = 1 - (1 - sparsity) * len(decoder_blocks(dense.model)) / present
    return [("pip and trim", share, sparsity), ("trim alone", 0.0, alone)]


def removed(name: str, share: float, seed: int, tokens: Tensor, windows: Tensor) -> dict[str, Any]:
    """What one method removes, and what is left of the model's quality."""
    dense, seconds = shrunk(name, share, seed, tokens)
    assert dense.structured is not None
    about = {key: dense.structured[key] for key in ("removed", "share")}
    return {**about, "seconds": seconds, "perplexity": perplexity(dense.model, windows).value}


def combined(share: float, sparsity: float, tokens: Tensor, windows: Tensor) -> dict[str, Any]:
    """A structured step, if ``share`` is not zero, then the default recipe with TRIM's rows."""
    dense, _ = shrunk("pip", share, 0, tokens) if share else (load_model(MODEL), 0.0)
    recipe = dataclasses.replace(make_recipe("best", sparsity, rows="trim"), calibration="file")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        artifact = prune(dense, recipe, tokens, Path(directory) / "a", choose_compute("cpu", dense.model.dtype))
        kept = sum(entry["nnz"] for entry in artifact.modules.values())
        size = artifact.manifest["bytes"]["artifact"]
    return {
        "share": share,
        "sparsity": sparsity,
        "kept_weights": kept,
        "bytes": size,
        "seconds": time.perf_counter() - begin,
        "perplexity": perplexity(dense.model, windows).value,
    }


def shrunk(name: str, share: float, seed: int, tokens: Tensor) -> tuple[DenseModel, float]:
    """The model after a structured step, and the seconds it took."""
    dense, begin = load_model(MODEL), time.perf_counter()
    reduced = reduce_model(dense, STRUCTURED[name], share, tokens, choose_compute("cpu", dense.model.dtype), seed)
    return reduced, time.perf_counter() - begin


def save(results: dict[str, Any]) -> None:
    """Write all figures so far, and show the last."""
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    name, result = list(results.items())[-1]
    print(f"{name}: perplexity {result['perplexity']:.2f}", flush=True)


if __name__ == "__main__":
    main()
