"""What each ingredient of the recipe `best` gives: one is changed at a time, with three calibration draws each.

So that a table of sixty cells takes an hour and not a day, only the first blocks are pruned, and what is measured is
not the perplexity on a test text but the KL divergence from the dense model, which needs far less text to tell two
models apart: on the calibration text's last eighth, of which pruning sees nothing. For whole models there is
`python -m benchmarks.quality`.

    python -m benchmarks.ablation --calibration FILE [--blocks 6] [--sparsity 0.8] [--seeds 0 1 2] [--only NAME ...]

Every cell is written down the moment it is finished, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from trim_export.allocation import layer_sparsities
from trim_export.bench import Workload, machine
from trim_export.calibration import consecutive_windows, read_text, token_stream, training_windows
from trim_export.errors import TrimExportError, UsageError, choose
from trim_export.evaluate import divergence
from trim_export.forward import BlockCall, Compute, block_calls, choose_compute, embed, run_block
from trim_export.gradients import gradient_norms
from trim_export.layer_budgets import LAYER_BUDGETS, Auto
from trim_export.models import DenseModel, decoder_blocks, load_model, projections, quiet_transformers
from trim_export.packing import pack_windows
from trim_export.progress import silently
from trim_export.recipe import Recipe, make_recipe
from trim_export.reconstruction import reconstruct_block
from trim_export.recover import METHODS
from trim_export.report import table
from trim_export.scores import SCORES
from trim_export.storage import read_json, write_bytes
from trim_export.sweep import sweep_blocks
from trim_export.training import Training

RESULTS = Path(__file__).parent / "results" / "ablation.json"
HELD_OUT, LENGTH = 12, 512
"""Windows that KL is measured on, and tokens of each."""


@dataclass(frozen=True)
class Variant:
    """A recipe that differs from `best` in one setting, or is followed by block reconstruction.

    Attributes:
        settings: of the recipe, by name.
        reconstruct: whether each block's kept weights are trained afterwards.
    """

    settings: Mapping[str, Any]
    reconstruct: bool = False


INGREDIENTS: dict[str, tuple[Any, ...]] = {
    "update": ("none", "refit", "sparsegpt", "fista"),
    "rows": ("uniform", "trim", "lagrangian", "anticipating"),
    "layers": ("uniform", "alpha", "dlp", "lsa"),
    "targets": ("own", "dense"),
    "context_length": (0,),
    "score": ("magnitude", "ria", "gblm"),
}
VARIANTS = {
    "best": Variant({}),
    **{
        f"{setting} {value}": Variant({setting: LAYER_BUDGETS[value]() if setting == "layers" else value})
        for setting, values in INGREDIENTS.items()
        for value in values
    },
    # Where kept weights do not change, the mask is all there is: the setting of the TRIM paper.
    "update none, rows trim": Variant({"update": "none", "rows": "trim"}),
    "update none, rows uniform": Variant({"update": "none", "rows": "uniform"}),
    "best, then block reconstruction": Variant({}, reconstruct=True),
}


@dataclass(frozen=True)
class Subject:
    """The model under test.

    Attributes:
        dense: the model; its first blocks are pruned in place and restored.
        blocks: those blocks, by name.
        originals: copies of them that stay dense.
        held_out: int64 ``[windows, tokens]``.
        wanted: log-probabilities of the dense model there, float16 ``[tokens, vocabulary]`` for each window.
        compute: where the forward runs.
    """

    dense: DenseModel
    blocks: dict[str, nn.Module]
    originals: dict[str, nn.Module]
    held_out: Tensor
    wanted: list[Tensor]
    compute: Compute

    def restore(self) -> None:
        """Make the model dense again."""
        for name, block in self.blocks.items():
            block.load_state_dict(self.originals[name].state_dict())

    @torch.inference_mode()
    def apart(self) -> float:
        """Mean KL divergence of the model as it is from the dense one, nats a token."""
        return statistics.mean(
            divergence(wanted.float(), _log_probabilities(self.dense, window)).kl
            for window, wanted in zip(self.held_out, self.wanted, strict=True)
        )


def main() -> int:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet_transformers()
    try:
        variants = {name: choose("variant", name, VARIANTS) for name in options.only}
        fill(options, variants)
    except TrimExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    Console(width=120).print(ablation_table(read_json(options.json)))
    return 0


def fill(options: argparse.Namespace, variants: Mapping[str, Variant]) -> None:
    """Measure the cells that the file of results lacks, all variants of one seed before those of the next."""
    protocol = {
        "model": options.model,
        "calibration": options.calibration.name,
        "blocks": options.blocks,
        "sparsity": options.sparsity,
        "held_out": [HELD_OUT, LENGTH],
    }
    stored = read_json(options.json) if options.json.exists() else {"protocol": protocol, "cells": []}
    if stored["protocol"] != protocol:
        raise UsageError(f"{options.json} was measured under another protocol; give another --json")
    done = {(cell["variant"], cell["seed"]) for cell in stored["cells"]}
    missing = [cell for cell in itertools.product(options.seeds, variants) if cell[::-1] not in done]
    if not missing:
        return
    subject = load_subject(options.model, options.calibration, options.blocks)
    for seed, name in missing:
        begin = time.perf_counter()
        apart = measure(subject, variants[name], options.calibration, options.sparsity, seed)
        seconds = time.perf_counter() - begin
        stored["cells"].append({"variant": name, "seed": seed, "kl": apart, "seconds": seconds})
        stored["machine"] = machine(Workload(repeats=1))
        write_bytes(options.json, (json.dumps(stored, indent=1) + "\n").encode())
        print(f"{name}, seed {seed}: KL {apart:.4f} ({seconds:.0f} s)", flush=True)


def load_subject(model: str, calibration: Path, count: int) -> Subject:
    """Load a model, and note what it says on the held-out windows."""
    dense = load_model(model)
    blocks = dict(itertools.islice(decoder_blocks(dense.model).items(), count))
    stream = token_stream(read_text(str(calibration), 0), dense.tokenizer)
    held_out = consecutive_windows(stream[len(stream) - len(stream) // 8 :], LENGTH, HELD_OUT)
    with torch.inference_mode():
        wanted = [_log_probabilities(dense, window).half() for window in held_out]
    compute = choose_compute("cpu", dense.model.dtype)
    return Subject(dense, blocks, copy.deepcopy(blocks), held_out, wanted, compute)


def measure(subject: Subject, variant: Variant, calibration: Path, sparsity: float, seed: int) -> float:
    """Prune the first blocks as a variant says, measure, and restore the model."""
    dense, blocks = subject.dense, subject.blocks
    recipe = make_recipe("best", sparsity, **variant.settings, calibration=str(calibration), seed=seed)
    # One window of the last eighth is drawn because the function wants one, and left out.
    windows = training_windows(
        recipe.calibration, dense.model, dense.tokenizer, recipe.samples + 1, recipe.sequence_length, seed, held_out=1
    )[:-1]
    packed = pack_windows(windows, recipe.context_length, dense.model)
    modules = list(blocks.values())
    calls = block_calls(dense.model, modules, packed.tokens[:1], packed.positions, packed.joined)
    hidden = embed(dense.model, modules, packed.tokens, packed.positions)
    gradients: Mapping[str, Mapping[str, Tensor]] = {}
    if SCORES[recipe.score].needs_gradients:
        gradients = gradient_norms(dense.model, blocks, windows, subject.compute)
    assert not isinstance(recipe.layers, Auto)
    sparsities = layer_sparsities(recipe.layers, recipe, blocks, calls, hidden, subject.compute, silently)
    for _ in sweep_blocks(blocks, calls, hidden, sparsities, gradients, recipe, subject.compute, silently):
        pass
    if variant.reconstruct:
        reconstruct(subject, recipe, calls, hidden)
    apart = subject.apart()
    subject.restore()
    return apart


def reconstruct(subject: Subject, recipe: Recipe, calls: Iterable[BlockCall], hidden: Tensor) -> None:
    """Train the kept weights of each pruned block in turn towards the dense block's output, as `recover` does."""
    method = METHODS["blocks"]
    training = Training(method.steps, method.learning_rate, recipe.seed)
    target = hidden
    for (name, block), call in zip(subject.blocks.items(), calls, strict=True):
        target = run_block(subject.originals[name], call, target, subject.compute)
        masks = {path: linear.weight.data != 0 for path, linear in projections(block).items()}
        reconstruct_block(name, block, masks, call, hidden, target, training, subject.compute)
        hidden = run_block(block, call, hidden, subject.compute)


def ablation_table(stored: Mapping[str, Any]) -> Table:
    """Mean and range over seeds, and the ratio to `best` over the seeds that both have."""
    found: dict[str, dict[int, float]] = {}
    for cell in stored["cells"]:
        found.setdefault(cell["variant"], {})[cell["seed"]] = cell["kl"]
    best = found.get("best", {})

    def ratio(kls: Mapping[int, float]) -> str:
        shared = kls.keys() & best.keys()
        return f"{sum(kls[seed] for seed in shared) / sum(best[seed] for seed in shared):.2f}" if shared else "-"

    about = stored["protocol"]
    return table(
        f"one ingredient of best changed: KL to the dense model in nats, first {about['blocks']} blocks of "
        f"{about['model']} pruned to {about['sparsity']:g}, held-out text of {about['calibration']}",
        ("variant", "mean", "min", "max", "x best", "seeds"),
        [
            (name, *(f"{reduce(kls.values()):.4f}" for reduce in (statistics.mean, min, max)), ratio(kls), len(kls))
            for name, kls in sorted(found.items(), key=lambda item: statistics.mean(item[1].values()))
        ],
    )


def _log_probabilities(dense: DenseModel, window: Tensor) -> Tensor:
    logits: Tensor = dense.model(window[None], use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


if __name__ == "__main__":
    sys.exit(main())
