"""Choosing a layer budget by trial: prune with each one in memory, and see which model stays closest to the dense one.

Published budgets do not carry over from one model, or one weight update, to another: what helps Llama hurts Qwen
(results in LSA's repository, ICLR 2026), so none of them is a safe default. The last sequences of the calibration text
are kept out of the trials and judge them, by the Kullback-Leibler divergence of the next-token distributions. Uniform
sparsity is among the candidates and stays unless another is closer, so the choice is never worse than uniform on those
sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trim_export.allocation import layer_sparsities
from trim_export.evaluate import divergence
from trim_export.forward import BlockCall, Compute, run_block, window_logits
from trim_export.layer_budgets import Auto, LayerBudget, split_sequences
from trim_export.progress import Track
from trim_export.recipe import Recipe
from trim_export.sweep import sweep_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["choose_budget"]


def choose_budget(
    auto: Auto,
    model: PreTrainedModel,
    recipe: Recipe,
    blocks: Mapping[str, nn.Module],
    calls: Sequence[BlockCall],
    tokens: Tensor,
    hidden: Tensor,
    gradients: Mapping[str, Mapping[str, Tensor]],
    compute: Compute,
    track: Track[Any],
) -> tuple[LayerBudget, dict[str, Any]]:
    """Try every candidate with the recipe's own scores, rows and weight update; the LM head stays dense.

    The time is that of a pruning run for each candidate, on at most 32 sequences. Beside the model one copy of its
    blocks' dense weights is held, and the logits of one sequence.

    Args:
        auto: what to try.
        model: dense, and as it was again in the end.
        recipe: how to prune.
        blocks: the model's.
        calls: how each is called.
        tokens: all calibration sequences, int64 ``[sequences, tokens]``.
        hidden: what enters the first block for them, ``[sequences, tokens, features]``.
        gradients: as for `sweep_blocks`.
        compute: where the forward runs.
        track: shows progress.

    Returns:
        The winner, and for the manifest ``{"chosen": budget, "candidates": [{"budget", "kl"}], "trial_sequences",
        "held_out_sequences"}`` with each budget's parameters and its mean divergence in nats (None: not finite).

    Raises:
        UsageError: too few sequences.
    """
    trial, held_out = split_sequences(len(tokens))
    judges, judged = tokens[-held_out:], hidden[-held_out:]
    modules = list(blocks.values())
    reference = judged
    for block, call in zip(track(modules, "dense model on held-out sequences"), calls, strict=True):
        reference = run_block(block.to(compute.device), call, reference, compute)
        block.to("cpu")

    def divergence_of(budget: LayerBudget) -> float:
        """Mean over all held-out positions."""
        start = hidden[:trial]
        sparsities = layer_sparsities(budget, recipe, blocks, calls, start, compute, track)
        states = judged
        for swept in sweep_blocks(
            blocks, calls, start, sparsities, gradients, recipe, compute, track, f"trial pruning with {budget.name}"
        ):
            states = run_block(swept.block, swept.call, states, compute)
        expected, given = (window_logits(model, modules, calls, judges, last) for last in (reference, states))
        found = [divergence(*logits) for logits in zip(expected, given, strict=True)]
        if not all(math.isfinite(window.max_abs_diff) for window in found):
            return math.inf
        return sum(window.kl for window in found) / held_out

    results: list[tuple[float, LayerBudget]] = []
    for budget in auto.candidates:
        with _restored(modules):
            results.append((divergence_of(budget), budget))
    _, chosen = min(results, key=lambda result: result[0])  # the first of equals, so uniform if it is among them
    return chosen, {
        "chosen": asdict(chosen),  # type: ignore[call-overload]
        "candidates": [
            {"budget": asdict(budget), "kl": kl if math.isfinite(kl) else None}  # type: ignore[call-overload]
            for kl, budget in results
        ],
        "trial_sequences": trial,
        "held_out_sequences": held_out,
    }


@contextmanager
def _restored(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Give the blocks their tensors back, bit for bit, whatever happens to them in between."""
    tensors = [tensor.clone() for block in blocks for tensor in block.state_dict().values()]
    try:
        yield
    finally:
        current = (tensor for block in blocks for tensor in block.state_dict().values())
        for tensor, dense in zip(current, tensors, strict=True):
            tensor.copy_(dense)
