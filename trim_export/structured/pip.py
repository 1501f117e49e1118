"""PIP: perturbation-based iterative pruning of decoder blocks (arXiv 2501.15278, Findings of EMNLP 2025).

Two views of the calibration text are read: as it is, and with characters edited. Blocks that "struggle to distinguish
between these two views", whose gradients hardly differ from one to the other, go one by one, and all is measured anew
after each.

The paper's body could not be had when this was written. Its abstract and summaries give the two views, the three kinds
of edits, gradient differences as the importance of a layer, and greedy iteration. What they leave open, and what is
done here:

* The size of a difference is ``sum |w (g' - g)|`` over a block's weights: the first-order term by which gradient-based
  structured pruning measures what a weight is worth to the loss (LLM-Pruner, arXiv 2305.11627), with the difference of
  the gradients in the gradient's place. It has the unit of the loss in every block, and stays the same when one
  matrix is scaled up and the next one down by as much.
* It is taken of each window's mean loss and averaged over ten windows, LLM-Pruner's number.
* A third of the words are edited. The perturbed view is cut to as many tokens as the original one has.

The size was chosen on SmolLM2-135M with 16 windows of the first half of WikiText-2's validation text, by perplexity on
4 x 512 tokens of the second half (dense, on twice as many: 24.3) after the eight blocks of least difference were
removed at once: 118 with the size above, taken before or after averaging over windows, and 167 with the norm of the
difference over the MLPs' weights; but 6,699 with the size relative to that of the gradients, 46,579 with the norm of
the difference relative to theirs, 135,521 with ``|sum w (g' - g)|`` and 187,059 with the norm: gradients shrink with
depth, so that a norm takes the last blocks; weights make up for that. Random draws gave 893, 3,987, 9,459, 17,643 and
5,115,213, the blocks that ShortGPT takes 78. One block at a time, on the test text, it is 557 where the norm gave
82,457 (``benchmarks/results/structured.json``): better than five random draws, worse than ShortGPT and FLAP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trim_export.errors import ModelError, UsageError
from trim_export.forward import Compute
from trim_export.models import DenseModel, decoder_blocks
from trim_export.progress import Track
from trim_export.structured.depth import blocks_to_remove, remove_blocks
from trim_export.structured.perturbation import perturb

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Pip", "gradient_differences", "perturbed_windows"]

CHECKPOINTED_PARAMETERS = 1_000_000_000
"""From this size on activations are computed again in the backward pass instead of being held."""


@dataclass(frozen=True)
class Pip:
    """Remove the block with the least difference between its gradients on the two views, and begin again.

    Time: a forward and a backward pass of two views of ``windows`` windows for each block removed. Memory: the model,
    one set of gradients of its blocks, and one window's activations.

    Attributes:
        windows: of the calibration text, evenly spread, that are read; LLM-Pruner's ten samples.
        rate: share of the words that are edited.
    """

    windows: int = 10
    rate: float = 1 / 3
    name: str = "pip"

    def __call__(
        self, dense: DenseModel, tokens: Tensor, share: float, seed: int, compute: Compute, track: Track[Any]
    ) -> dict[str, Any]:
        """Remove blocks one by one until the share is reached."""
        count = blocks_to_remove(dense.model, share)
        if tokens.shape[1] < 2:
            raise UsageError("pip needs calibration windows of at least 2 tokens: a single one predicts nothing")
        clean = tokens[:: max(1, len(tokens) // self.windows)][: self.windows]
        perturbed = perturbed_windows(clean, dense.tokenizer, self.rate, seed)
        present = list(range(len(decoder_blocks(dense.model))))
        steps = []
        for _ in track(list(range(count)), "gradient differences"):
            differences = gradient_differences(dense.model, clean, perturbed, compute)
            least = min(range(len(present)), key=differences.__getitem__)
            remove_blocks(dense.model, [least])
            steps.append({"block": present.pop(least), "difference": differences[least]})
        return {"blocks": sorted(step["block"] for step in steps), "steps": steps}


def perturbed_windows(clean: Tensor, tokenizer: PreTrainedTokenizerBase, rate: float, seed: int) -> list[Tensor]:
    """The perturbed view of each window, int64 ``[tokens]``, at most as long as the window.

    Raises:
        UsageError: a window without words, of which too little is left to predict.
    """
    views = []
    for number, window in enumerate(clean):
        text = perturb(str(tokenizer.decode(window)), rate, seed + number)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: len(window)], dtype=torch.int64)
        if len(ids) < 2:
            raise UsageError(f"calibration window {number} has no text to perturb; give another --calibration")
        views.append(ids)
    return views


def gradient_differences(
    model: PreTrainedModel, clean: Tensor, perturbed: list[Tensor], compute: Compute
) -> list[float]:
    """``mean_x sum_i |w_i (dL(x')/dw_i - dL(x)/dw_i)|`` over all parameters w_i of each block.

    Raises:
        ModelError: naming the first block at which that is not finite.
    """
    blocks = decoder_blocks(model)
    totals = dict.fromkeys(blocks, 0.0)
    model.to(compute.device)  # type: ignore[arg-type]  # transformers types it as if it took a module
    try:
        with torch.enable_grad(), _differentiable(model, blocks):
            for window, view in zip(clean, perturbed, strict=True):
                # Gradients of the two losses add up where autograd puts them, one with its sign reversed.
                for ids, sign in ((view, 1.0), (window, -1.0)):
                    batch = ids[None].to(compute.device, copy=True)
                    with compute.context():
                        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                    (sign * loss).backward()
                for name, block in blocks.items():
                    totals[name] += _take_size(block) / len(perturbed)
    finally:
        model.to("cpu")  # type: ignore[arg-type]
    for name, total in totals.items():
        if not torch.isfinite(torch.tensor(total)):
            raise ModelError(f"{name}: NaN or infinity in its gradients; use --structured shortgpt")
    return list(totals.values())


def _take_size(block: nn.Module) -> float:
    """Size of a block's gradients in units of the loss; they are dropped."""
    size = 0.0
    for parameter in block.parameters():
        if parameter.grad is not None:
            size += float((parameter.detach().float() * parameter.grad.float()).abs().sum(dtype=torch.float64))
            parameter.grad = None
    return size


@contextmanager
def _differentiable(model: PreTrainedModel, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Gradients for the blocks' parameters alone; large models do not hold their activations."""
    checkpointing = sum(parameter.numel() for parameter in model.parameters()) >= CHECKPOINTED_PARAMETERS
    model.requires_grad_(False)
    for block in blocks.values():
        block.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints only then; the models that we prune have no dropout to switch on
    try:
        yield
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.requires_grad_(False)
        model.eval()
