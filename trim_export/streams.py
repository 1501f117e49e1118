"""Two streams through one block: the dense model's activations beside the pruned model's.

A weight update wants to know, for the layers that read one input, what the pruned model feeds them (the Gram matrix),
what the dense model feeds them (the cross-Gram), and, for the layers that write into the residual stream, how far the
two streams are apart there, so that the update can repair the difference. Layers are visited in the order in which the
block calls them, those that share an input together: q, k, v; o; gate, up; down.

Of the dense stream, one block's layer inputs are held at a time (tokens x their widths, in the host's memory); the
pruned stream is summed up batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.forward import BlockCall, Compute, StopForward, batch_windows
from trim_export.statistics import InputStatistics, require_finite_inputs

__all__ = ["DenseStream", "GroupStatistics", "observe_dense", "observe_pruned"]


@dataclass(frozen=True)
class DenseStream:
    """What one dense block does with the dense model's activations.

    Attributes:
        groups: layers that share an input, in the order of their calls.
        writers: layers whose outputs are added to the residual stream, in that order.
        inputs: first layer of each group -> its inputs, ``[tokens, columns]`` for each batch.
        residuals: writer -> the residual stream just before its output is added, ``[tokens, features]`` a batch.
        output: what the block gives, ``[windows, tokens, features]``.
    """

    groups: list[list[str]]
    writers: list[str]
    inputs: dict[str, list[Tensor]]
    residuals: dict[str, list[Tensor]]
    output: Tensor


@dataclass(frozen=True)
class GroupStatistics:
    """Sums over all calibration tokens for the layers that share one input, float32.

    Attributes:
        gram: ``[columns, columns]``, the sum of x x^T over the pruned model's inputs.
        cross: ``[columns, columns]``, the sum of x_dense x^T.
        residual: ``[features, columns]``, the sum of (r_dense - r) x^T with r the residual stream just before this
            layer's output is added; None for layers that do not write into it.
        inputs: what scores and row budgets use, of the pruned model's inputs.
    """

    gram: Tensor
    cross: Tensor
    residual: Tensor | None
    inputs: InputStatistics


@dataclass(frozen=True)
class _Seen:
    """One batch through a block: what each layer read and gave, in the order of the calls, and the block's output."""

    order: list[str]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    output: Tensor | None


@torch.no_grad()
def observe_dense(
    block: nn.Module, linears: Mapping[str, nn.Linear], call: BlockCall, hidden: Tensor, compute: Compute
) -> DenseStream:
    """Send the dense stream through a block that is still dense, and keep what its layers see."""
    groups: list[list[str]] = []
    writers: list[str] = []
    inputs: dict[str, list[Tensor]] = {}
    residuals: dict[str, list[Tensor]] = {}
    outputs: list[Tensor] = []
    for batch in hidden.split(batch_windows(hidden.shape[1])):
        seen = _watch(block, linears, call, batch, compute)
        assert seen.output is not None
        if not outputs:
            groups = _group(seen)
            writers = _find_writers(groups, seen, batch.to(compute.device))
        for leader, *_ in groups:
            inputs.setdefault(leader, []).append(_flat(seen.inputs[leader]).to(hidden.device))
        for writer in writers:
            before = _residual_before(writer, writers, seen, batch.to(compute.device))
            residuals.setdefault(writer, []).append(before.to(hidden.device))
        outputs.append(seen.output.to(hidden.device, hidden.dtype))
    return DenseStream(groups, writers, inputs, residuals, torch.cat(outputs))


@torch.no_grad()
def observe_pruned(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    group: list[str],
    dense: DenseStream,
    call: BlockCall,
    hidden: Tensor,
    compute: Compute,
    name: str,
) -> GroupStatistics:
    """Send the pruned stream through a block whose earlier layers are pruned, up to one group of layers.

    Raises:
        ModelError: naming block and layer, if the inputs are not finite.
    """
    leader = group[0]
    columns, features = linears[leader].in_features, hidden.shape[-1]
    gram = torch.zeros(columns, columns, device=compute.device)
    cross = torch.zeros_like(gram)
    writes = leader in dense.writers
    residual = torch.zeros(features, columns, device=compute.device) if writes else None
    last_tokens = []
    for number, batch in enumerate(hidden.split(batch_windows(hidden.shape[1]))):
        seen = _watch(block, linears, call, batch, compute, stop_before=leader)
        inputs = _flat(seen.inputs[leader]).float()
        gram.addmm_(inputs.T, inputs)
        cross.addmm_(dense.inputs[leader][number].to(compute.device).float().T, inputs)
        if residual is not None:
            before = _residual_before(leader, dense.writers, seen, batch.to(compute.device))
            apart = dense.residuals[leader][number].to(compute.device).float() - before.float()
            residual.addmm_(apart.T, inputs)
        last_tokens.append(inputs.reshape(len(batch), -1, columns)[:, -1].clone())
    require_finite_inputs(gram, f"{name}.{leader}")
    last = torch.cat(last_tokens).T.contiguous()
    return GroupStatistics(gram, cross, residual, InputStatistics(gram.diagonal() / len(hidden), last))


def _watch(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    call: BlockCall,
    batch: Tensor,
    compute: Compute,
    stop_before: str | None = None,
) -> _Seen:
    """Run one batch and note what every layer reads and gives, at most until one layer is about to run."""
    order: list[str] = []
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def before(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            order.append(path)
            inputs[path] = args[0]
            if path == stop_before:
                raise StopForward

        return hook

    def after(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[path] = output

        return hook

    handles = [linear.register_forward_pre_hook(before(path)) for path, linear in linears.items()]
    handles += [linear.register_forward_hook(after(path)) for path, linear in linears.items()]
    result: Tensor | None = None
    try:
        result = call.run(block, batch, compute)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return _Seen(order, inputs, outputs, result)


def _group(seen: _Seen) -> list[list[str]]:
    """Layers in the order of their calls, those that read the very same tensor together."""
    groups: list[list[str]] = []
    for path in seen.order:
        if groups and seen.inputs[path] is seen.inputs[groups[-1][0]]:
            groups[-1].append(path)
        else:
            groups.append([path])
    return groups


def _find_writers(groups: list[list[str]], seen: _Seen, batch: Tensor) -> list[str]:
    """The layers whose outputs the block adds to its input, if that is all it does with the residual stream.

    Candidates are layers as wide as the stream that share their input with no other (o and down in Llama). Where a norm
    follows them (Gemma) the sum does not come out, and none is returned: such a block is fitted without the residual.
    """
    assert seen.output is not None
    features = batch.shape[-1]
    writers = [group[0] for group in groups if len(group) == 1 and seen.outputs[group[0]].shape[-1] == features]
    added = sum((_flat(seen.outputs[path]).float() for path in writers), torch.zeros((), device=batch.device))
    change = _flat(seen.output).float() - _flat(batch).float()
    fits = bool((change - added).norm() <= 0.02 * change.norm())
    return writers if writers and fits else []


def _residual_before(writer: str, writers: list[str], seen: _Seen, batch: Tensor) -> Tensor:
    """The residual stream, ``[tokens, features]``, just before ``writer`` adds to it."""
    earlier = [_flat(seen.outputs[path]).to(batch.dtype) for path in writers[: writers.index(writer)]]
    return sum(earlier, _flat(batch))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
