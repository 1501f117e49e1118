"""Structured pruning side by side, and with unstructured pruning on top of it, on SmolLM2-135M.

    python -m benchmarks.structured --calibration wikitext2_valid.txt --data wikitext2_test.txt

Every method removes a fifth of the parameters; FLAP, which can, removes exactly as many as the others do in whole
blocks. Random removal is drawn five times. Then PIP's first tenth is removed and the rest pruned at 70 % (recipe fast
with TRIM's rows), against the same pruning alone at the sparsity that leaves as many weights. Perplexity on the first 8
windows of 1024 tokens.
"""

from __future__ import annotations

import argparse
import copy
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
from trim_export.structured import STRUCTURED, blocks_to_remove, reduce_model, remove_blocks

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
    draws = [("random", seed) for seed in range(DRAWS)]
    for name, seed in [("pip", 0), ("last", 0), ("shortgpt", 0), ("flap", 0), *draws]:
        key = f"{name}, seed {seed}"
        if key not in results:
            share = REMOVE if name != "flap" else results["last, seed 0"]["share"]
            results[key] = removed(dense, name, share, seed, tokens, windows)
            save(results)
    share, sparsity = COMBINED
    first = [step["block"] for step in results["pip, seed 0"]["removed"]["steps"]][
        : blocks_to_remove(dense.model, share)
    ]
    present = len(decoder_blocks(dense.model))
    alone = 1 - (1 - sparsity) * (present - len(first)) / present
    for key, blocks, rest in (("pip and trim", first, sparsity), ("trim alone", [], alone)):
        if key not in results:
            results[key] = combined(dense, blocks, rest, tokens, windows)
            save(results)


def removed(whole: DenseModel, name: str, share: float, seed: int, tokens: Tensor, windows: Tensor) -> dict[str, Any]:
    """What one method removes, and what is left of the model's quality."""
    dense, begin = dataclasses.replace(whole, model=copy.deepcopy(whole.model)), time.perf_counter()
    compute = choose_compute("cpu", dense.model.dtype)
    reduced = reduce_model(dense, STRUCTURED[name], share, tokens, compute, seed)
    assert reduced.structured is not None
    about = {key: reduced.structured[key] for key in ("removed", "share")}
    seconds = time.perf_counter() - begin
    return {**about, "seconds": seconds, "perplexity": perplexity(reduced.model, windows).value}


def combined(whole: DenseModel, blocks: list[int], sparsity: float, tokens: Tensor, windows: Tensor) -> dict[str, Any]:
    """Some blocks removed, the others pruned with TRIM's rows."""
    dense, begin = dataclasses.replace(whole, model=copy.deepcopy(whole.model)), time.perf_counter()
    remove_blocks(dense.model, blocks)
    recipe = make_recipe("fast", sparsity, rows="trim")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "a"
        artifact = prune(dense, recipe, tokens[: recipe.samples], out, choose_compute("cpu", dense.model.dtype))
        kept = sum(entry["nnz"] for entry in artifact.modules.values())
        size = artifact.manifest["bytes"]["artifact"]
    return {
        "blocks": sorted(blocks),
        "sparsity": sparsity,
        "kept_weights": kept,
        "bytes": size,
        "seconds": time.perf_counter() - begin,
        "perplexity": perplexity(dense.model, windows).value,
    }


def save(results: dict[str, Any]) -> None:
    """Write all figures so far, and show the last."""
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    name, result = list(results.items())[-1]
    print(f"{name}: perplexity {result['perplexity']:.2f}", flush=True)


if __name__ == "__main__":
    main()
