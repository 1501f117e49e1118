"""Block reconstruction: train the kept weights of one decoder block until it does what the dense block does.

The block reads the stream of the recovered model and is trained towards the dense block's output on the dense model's
stream, so that it also makes up for what the blocks before it have lost. Reconstructing whole blocks with a fixed mask
is EBFT's way (Guo et al., arXiv 2402.12419); that it rivals retraining the whole model is the finding of "A Free Lunch
in LLM Compression" (arXiv 2510.14444). Adam's settings are EBFT's; the loss is relative, so that the few tokens whose
activations are a thousand times larger do not drown the others.

Norms and biases stay as they are. Memory on the device beside the block: its kept weights in float32 four times (the
weights, the best ones, Adam's two moments), their gradients, one dense copy of the weights, and the activations of one
batch of a thousand tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trim_export.errors import ModelError
from trim_export.forward import BlockCall, Compute, batch_windows
from trim_export.training import (
    EVALUATE_EVERY,
    Fit,
    Training,
    backward,
    held_out_windows,
    learning_rate,
    mean_loss,
    window_batches,
)

__all__ = ["reconstruct_block", "relative_error"]


def reconstruct_block(
    name: str,
    block: nn.Module,
    masks: Mapping[str, Tensor],
    call: BlockCall,
    hidden: Tensor,
    target: Tensor,
    training: Training,
    compute: Compute,
) -> Fit:
    """Train a block's kept weights in place; they end as those that did best on the held-out windows.

    The weights are trained as float32 numbers, and always multiplied in the dtype they are stored in, so that what is
    measured is what will be stored.

    Args:
        name: of the block, for messages.
        block: on the compute device.
        masks: path of a layer inside the block -> bool ``[rows, columns]``, True where a weight is kept.
        call: how the block is called.
        hidden: what the recovered model feeds the block, ``[windows, tokens, features]``; the last ones are held out.
        target: what the dense block gives, of the same shape.
        training: steps, rate and seed.
        compute: where and in which arithmetic the block runs.

    Returns:
        `relative_error` on the held-out windows.

    Raises:
        ModelError: the loss is not finite before anything is trained.
    """
    dtypes = {path: block.get_parameter(f"{path}.weight").dtype for path in masks}
    values = {
        path: block.get_parameter(f"{path}.weight").data[mask].float().requires_grad_() for path, mask in masks.items()
    }

    def spread(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{path}.weight": _spread(kept[path].to(dtypes[path]), mask) for path, mask in masks.items()}

    def recovered(*args: Any, **kwargs: Any) -> Any:
        return functional_call(block, spread(values), args, kwargs)

    def loss(windows: Tensor) -> Tensor:
        return relative_error(call.run(recovered, hidden[windows], compute), target[windows].to(compute.device))

    trained = len(hidden) - held_out_windows(len(hidden))
    held = torch.arange(trained, len(hidden), device=hidden.device)

    def held_out_loss() -> float:
        return mean_loss(loss, held, batch_windows(hidden.shape[1]), compute.device)

    optimizer = torch.optim.Adam(values.values(), betas=(0.9, 0.95))
    before = after = held_out_loss()
    if not before < float("inf"):
        raise ModelError(f"{name}: NaN or infinity in its activations; nothing can be recovered on them")
    best, best_step = {path: kept.detach().clone() for path, kept in values.items()}, 0
    batches = window_batches(trained, hidden.shape[1], training)
    for step, windows in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(training, step)
        backward(loss, windows, optimizer, compute.device)
        optimizer.step()
        if step % EVALUATE_EVERY and step < training.steps:
            continue
        reached = held_out_loss()
        if reached < after:
            after, best_step = reached, step
            best = {path: kept.detach().clone() for path, kept in values.items()}
    for parameter, weight in spread(best).items():
        block.get_parameter(parameter).data = weight
    return Fit(before, after, best_step)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ``|output - target|^2 / |target|^2``; both ``[..., features]``, summed in float32."""
    apart = (output.float() - target.float()).square().sum(-1)
    return (apart / target.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """The weight ``[rows, columns]`` whose kept entries are ``values``, in row-major order."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
