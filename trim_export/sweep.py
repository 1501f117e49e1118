"""One sweep over the decoder blocks: prune a block, send the calibration windows on through it, go to the next.

Both the run that is stored and the trials that choose its layer budget are such sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trim_export.forward import BlockCall, Compute, run_block
from trim_export.progress import Track
from trim_export.prune_block import PrunedBlock, mask_block, update_block
from trim_export.recipe import Recipe

__all__ = ["SweptBlock", "sweep_blocks"]


@dataclass(frozen=True)
class SweptBlock:
    """One block of the pruned model, still on the compute device.

    Attributes:
        index: its place.
        name: in the model.
        block: with pruned weights.
        call: how it is called.
        pruned: what is kept of its matrices; None if an earlier run had finished it.
        hidden: what it gives for the calibration windows, ``[windows, tokens, features]``.
    """

    index: int
    name: str
    block: nn.Module
    call: BlockCall
    pruned: PrunedBlock | None
    hidden: Tensor


def sweep_blocks(
    blocks: Mapping[str, nn.Module],
    calls: Sequence[BlockCall],
    hidden: Tensor,
    sparsities: Sequence[Mapping[str, float]],
    gradients: Mapping[str, Mapping[str, Tensor]],
    recipe: Recipe,
    compute: Compute,
    track: Track[Any],
    description: str = "pruning",
    finished: Mapping[str, Callable[[nn.Module], None]] | None = None,
) -> Iterator[SweptBlock]:
    """Prune the blocks of a model in place, one at a time, each on what the pruned blocks before it give.

    Args:
        blocks: all of them, by name and in order, dense.
        calls: how each is called.
        hidden: what enters the first, ``[windows, tokens, features]``.
        sparsities: of each block's matrices, by the layers' names inside the block.
        gradients: block -> those of its layers (`trim_export.gradients`); empty if the score needs none.
        recipe: everything else.
        compute: where the forward runs.
        track, description: show progress.
        finished: block that needs no pruning any more -> a function that gives it its pruned weights.
    """
    updates = recipe.update != "none"
    dense_hidden = hidden  # the dense model's own stream, carried along when kept weights are fitted to it
    pruned: PrunedBlock | None
    for index, (name, block) in enumerate(track(list(blocks.items()), description)):
        block.to(compute.device)
        call, sparsity = calls[index], sparsities[index]
        norms = {path: norm.to(compute.device) for path, norm in gradients.get(name, {}).items()}
        if finished and name in finished:
            if updates:
                dense_hidden = run_block(block, call, dense_hidden, compute)
            finished[name](block)
            pruned, hidden = None, run_block(block, call, hidden, compute)
        elif updates:
            pruned, hidden, dense_hidden = update_block(
                name, block, call, hidden, dense_hidden, norms, sparsity, recipe, compute
            )
        else:
            pruned, hidden = mask_block(name, block, call, hidden, norms, sparsity, recipe, compute)
        yield SweptBlock(index, name, block, call, pruned, hidden)
        block.to("cpu")
