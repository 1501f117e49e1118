"""Gradients of the dense model's loss, window by window: what GBLM-Pruner (arXiv 2311.04902) scores weights with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trim_export.errors import ModelError
from trim_export.forward import Compute
from trim_export.models import projections
from trim_export.prune_block import require_finite_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["gradient_norms"]


def gradient_norms(
    model: PreTrainedModel,
    blocks: Mapping[str, nn.Module],
    tokens: Tensor,
    compute: Compute,
    track: Callable[[Iterable[Tensor], str], Iterable[Tensor]] = lambda items, description: items,
) -> dict[str, dict[str, Tensor]]:
    """``sqrt(sum_n g_n^2)`` of every prunable weight, g_n being the gradient of the mean loss on window n.

    Time: one forward and one backward pass of each window. Memory, on the compute device: the whole model, one window's
    activations, and one float32 accumulator for each prunable weight. There is never a set of gradients besides: each
    is added to its accumulator, and dropped, as soon as autograd has it.

    Args:
        model: dense. Evaluated without dropout; afterwards its modes and ``requires_grad`` flags are what they were.
        blocks: its decoder blocks by name; everything outside their `nn.Linear` weights is held fixed.
        tokens: int64 ``[windows, tokens]``, at least two tokens each.
        compute: where and in which arithmetic the passes run.
        track: shows progress.

    Returns:
        Block -> name of the layer inside it -> float32 ``[rows, columns]``, in the host's memory.

    Raises:
        ModelError: naming a layer whose weight is not finite, or at which the backward pass first met NaN or infinity.
    """
    weights: dict[tuple[str, str], Tensor] = {}
    for name, block in blocks.items():
        for path, linear in projections(block).items():
            require_finite_weight(linear, f"{name}.{path}")
            weights[name, path] = linear.weight
    model.to(compute.device)  # type: ignore[arg-type]  # transformers types it as if it took a module
    squares = {place: torch.zeros_like(weight, dtype=torch.float32) for place, weight in weights.items()}
    with torch.enable_grad(), _trainable(model, list(weights.values())):
        handles = [
            weight.register_post_accumulate_grad_hook(_accumulate(squares[place], ".".join(place)))
            for place, weight in weights.items()
        ]
        try:
            for window in track(tokens.split(1), "measuring gradients"):
                # A copy, because text that the model wrote itself comes from inference mode, which autograd refuses.
                ids = window.to(compute.device, copy=True)
                with compute.context():
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            model.to("cpu")  # type: ignore[arg-type]
    norms: dict[str, dict[str, Tensor]] = {name: {} for name in blocks}
    for (name, path), square in squares.items():
        norms[name][path] = square.sqrt_().cpu()
    return norms


def _accumulate(square: Tensor, name: str) -> Callable[[Tensor], None]:
    """A hook that adds a weight's squared gradient to ``square`` and drops it."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        weight.grad = None
        square.addcmul_(gradient, gradient)
        if not bool(square.isfinite().all()):
            raise ModelError(
                f"{name}: NaN or infinity in the gradient of the calibration loss; use a score without gradients"
            )

    return hook


@contextmanager
def _trainable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Let only ``weights`` take gradients, in evaluation mode; put everything back at the end and leave none behind."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        for weight in weights:
            weight.grad = None
