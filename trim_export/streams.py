"""Two streams through one block: the dense model's activations beside the pruned model's.

A weight update wants to know, for the layers that read one input, what the pruned model feeds them (the Gram matrix)
and what they should give (the target): what the dense model gives there; for the layers that write into the residual
stream, what leaves the two streams equal, so that the update also makes up for what was lost before. Layers are visited
in the order in which the block calls them, those that share an input together: q, k, v; o; gate, up; down.

Of the dense stream, one block's layer inputs are held at a time (tokens x their widths, in the host's memory); the
pruned stream is summed up batch by batch, and of its last layer what the block's output takes is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trim_export.forward import BlockCall, Compute, StopForward, batch_windows, move
from trim_export.statistics import InputStatistics, require_finite_inputs

__all__ = ["DenseStream", "Finished", "GroupStatistics", "Pending", "observe_dense", "observe_pruned"]

SMALLEST_TILE = 256
"""Columns below which a Gram matrix is computed whole: its symmetry saves nothing any more."""


@dataclass(frozen=True)
class DenseStream:
    """What one dense block does with the dense model's activations.

    Attributes:
        groups: layers that share an input, in the order of their calls.
        writers: layers whose outputs are added to the residual stream, in that order.
        inputs: first layer of each group that does not write -> its inputs, ``[tokens, columns]`` for each batch.
        sums: writer -> the residual stream just after its output was added, ``[tokens, features]`` for each batch.
        output: what the block gives, ``[windows, tokens, features]``.
        ends_with_writer: whether the output is the last layer's output added to the residual stream, bit for bit.
        ends: larger part of the block -> the layer whose output is all that it gives, and how many values it gives,
            the others being None (attention: o_proj and 2); 0 if it gives that output itself.
    """

    groups: list[list[str]]
    writers: list[str]
    inputs: dict[str, list[Tensor]]
    sums: dict[str, list[Tensor]]
    output: Tensor
    ends_with_writer: bool
    ends: dict[str, tuple[str, int]]


@dataclass(frozen=True)
class GroupStatistics:
    """Sums over all calibration tokens for the layers that share one input, float32.

    Attributes:
        gram: ``[columns, columns]``, the sum of x x^T over the pruned model's inputs.
        cross: ``[columns, columns]``, the sum of x_dense x^T; None for a layer that writes into the residual stream.
        target: ``[features, columns]``, for a writer the sum of (s_dense - r - b) x^T, with s_dense the dense residual
            stream after the layer's output is added, r the pruned one before, and b the layer's bias; else None.
        inputs: what scores and row budgets use, of the pruned model's inputs.
        pending: what the block's output still lacks, after the last group of a block that ends with a writer.
    """

    gram: Tensor
    cross: Tensor | None
    target: Tensor | None
    inputs: InputStatistics
    pending: Pending | None

    def targets(self, weight: Tensor) -> Tensor:
        """The sum of y x^T ``[rows, columns]``, y being what the layer should give; ``weight`` is its dense one."""
        if self.target is not None:
            return self.target
        assert self.cross is not None
        return weight @ self.cross


@dataclass(frozen=True)
class Pending:
    """A block's output without its last layer's share.

    Attributes:
        residuals: the residual stream before the last layer's output is added, ``[windows, tokens, features]`` a batch.
        inputs: of the last layer, as the block calls it, a batch each.
    """

    residuals: list[Tensor]
    inputs: list[Tensor]

    @torch.no_grad()
    def finish(self, last: nn.Linear, compute: Compute) -> Tensor:
        """The block's output with the last layer as it is now; the very bits that running the block would give."""
        outputs = []
        for residual, inputs in zip(self.residuals, self.inputs, strict=True):
            with compute.context():
                added = last(inputs.to(compute.device)).view_as(residual)
                outputs.append((residual.to(compute.device) + added).to(residual))
        return torch.cat(outputs)


@dataclass(frozen=True)
class Finished:
    """What the passes of one block need not compute again, a batch each.

    Attributes:
        outputs: of layers, and of larger parts of the block.
        inputs: of layers that a pass stopped before, while they were being pruned.
    """

    outputs: dict[str, list[Any]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def batch(self, number: int) -> dict[str, Any]:
        """The outputs of one batch."""
        return {path: outputs[number] for path, outputs in self.outputs.items() if len(outputs) > number}

    @torch.no_grad()
    def finish(self, linears: Mapping[str, nn.Linear], ends: Mapping[str, tuple[str, int]], compute: Compute) -> None:
        """Turn inputs into outputs: of the layers as they are now, and of the parts that end with them."""
        for path, batches in self.inputs.items():
            self.outputs[path] = [_through(linears[path], inputs, compute) for inputs in batches]
            for part, (last, values) in ends.items():
                if last == path:
                    given = self.outputs[path]
                    self.outputs[part] = [(output, *(None,) * (values - 1)) for output in given] if values else given
        self.inputs.clear()


@dataclass(frozen=True)
class _Seen:
    """One batch through a block: what each layer read and gave, in the order of the calls, and the block's output.

    ``outputs`` are also those of the block's larger parts, whatever they give (attention gives a tuple).
    """

    order: list[str]
    inputs: dict[str, Tensor]
    outputs: dict[str, Any]
    output: Tensor | None


@torch.no_grad()
def observe_dense(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    call: BlockCall,
    hidden: Tensor,
    compute: Compute,
    residual: bool = True,
) -> DenseStream:
    """Send the dense stream through a block that is still dense, and keep what its layers see.

    Without ``residual`` no layer is taken for one that writes into the residual stream.
    """
    groups: list[list[str]] = []
    writers: list[str] = []
    inputs: dict[str, list[Tensor]] = {}
    sums: dict[str, list[Tensor]] = {}
    outputs: list[Tensor] = []
    ends_with_writer = False
    ends: dict[str, tuple[str, int]] = {}
    for batch in hidden.split(batch_windows(hidden.shape[1])):
        seen = _watch(block, linears, call, batch, compute, replay={})
        assert seen.output is not None
        if not outputs:
            groups, ends = _group(seen), _ends(seen, linears)
            writers = _find_writers(groups, seen, batch.to(compute.device)) if residual else []
            ends_with_writer = writers[-1:] == groups[-1] and torch.equal(
                _residual_after(writers[-1], writers, seen, batch.to(compute.device)), seen.output
            )
        for leader, *_ in groups:
            if leader not in writers:
                inputs.setdefault(leader, []).append(_flat(seen.inputs[leader]).to(hidden.device))
        for writer in writers:
            after = _residual_after(writer, writers, seen, batch.to(compute.device))
            sums.setdefault(writer, []).append(_flat(after).to(hidden.device))
        outputs.append(seen.output.to(hidden.device, hidden.dtype))
    return DenseStream(groups, writers, inputs, sums, torch.cat(outputs), ends_with_writer, ends)


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
    finished: Finished,
) -> GroupStatistics:
    """Send the pruned stream through a block whose earlier layers are pruned, up to one group of layers.

    Args:
        block, linears, group, dense, call, hidden, compute: which group of what.
        name: of the block, for messages.
        finished: by the passes before this one; what this one computes is added for the next group.

    Raises:
        ModelError: naming block and layer, if the inputs are not finite.
    """
    leader = group[0]
    columns, features = linears[leader].in_features, hidden.shape[-1]
    writes = leader in dense.writers
    gram = torch.zeros(columns, columns, device=compute.device)
    wanted = torch.zeros(features if writes else columns, columns, device=compute.device)
    pending = Pending([], []) if dense.ends_with_writer and group == dense.groups[-1] else None
    last_tokens = []
    finished.finish(linears, dense.ends, compute)
    is_end = any(leader == last for last, _ in dense.ends.values())
    for number, batch in enumerate(hidden.split(batch_windows(hidden.shape[1]))):
        replay = finished.batch(number)
        seen = _watch(block, linears, call, batch, compute, replay, stop_before=leader)
        if group != dense.groups[-1]:
            for path in seen.outputs.keys() - replay.keys():
                finished.outputs.setdefault(path, []).append(move(seen.outputs[path], hidden.device))
            if is_end:
                finished.inputs.setdefault(leader, []).append(seen.inputs[leader].to(hidden.device))
        inputs = _flat(seen.inputs[leader]).float()
        _add_gram(gram, inputs)
        if writes:
            before = _residual_before(leader, dense.writers, seen, batch.to(compute.device))
            apart = dense.sums[leader][number].to(compute.device).float() - _flat(before).float()
            if linears[leader].bias is not None:
                apart -= linears[leader].bias.float()  # the pruned layer adds it again
            wanted.addmm_(apart.T, inputs)
            if pending is not None:
                pending.residuals.append(before.to(hidden.device))
                pending.inputs.append(seen.inputs[leader].to(hidden.device))
        else:
            wanted.addmm_(dense.inputs[leader][number].to(compute.device).float().T, inputs)
        last_tokens.append(inputs.reshape(len(batch) * call.joined, -1, columns)[:, -1].clone())
    gram = gram.tril() + gram.tril(-1).T
    require_finite_inputs(gram, f"{name}.{leader}")
    last = torch.cat(last_tokens)
    statistics = InputStatistics(gram.diagonal() / len(last), last.T.contiguous())
    cross, target = (None, wanted) if writes else (wanted, None)
    return GroupStatistics(gram, cross, target, statistics, pending)


def _add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Add ``inputs^T inputs`` to the lower triangle of a Gram matrix; what is above it is left undefined."""
    columns = len(gram)
    if columns <= SMALLEST_TILE:
        gram.addmm_(inputs.T, inputs)
        return
    half = columns // 2
    left, right = inputs[:, :half], inputs[:, half:]
    _add_gram(gram[:half, :half], left)
    _add_gram(gram[half:, half:], right)
    gram[half:, :half].addmm_(right.T, left)


def _watch(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    call: BlockCall,
    batch: Tensor,
    compute: Compute,
    replay: Mapping[str, Any],
    stop_before: str | None = None,
) -> _Seen:
    """Run one batch and note what every layer reads and gives, at most until one layer is about to run.

    Layers and other parts of the block in ``replay`` give what stands there.
    """
    parts = {path: part for path, part in block.named_children() if path not in linears and _holds(path, linears)}
    watched: dict[str, nn.Module] = {**linears, **parts}
    order: list[str] = []
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Any] = {path: move(known, compute.device) for path, known in replay.items()}

    def before(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            order.append(path)
            inputs[path] = args[0]
            if path == stop_before:
                raise StopForward

        return hook

    def after(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[path] = output

        return hook

    handles = [linear.register_forward_pre_hook(before(path)) for path, linear in linears.items()]
    handles += [module.register_forward_hook(after(path)) for path, module in watched.items()]
    for path in replay:  # hides the methods until they are deleted again
        watched[path].forward = lambda *_, given=outputs[path], **__: given
    result: Tensor | None = None
    try:
        result = call.run(block, batch, compute)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for path in replay:
            del watched[path].forward
    return _Seen(order, inputs, outputs, result)


def _holds(part: str, linears: Mapping[str, nn.Linear]) -> bool:
    return any(path.startswith(f"{part}.") for path in linears)


def _ends(seen: _Seen, linears: Mapping[str, nn.Linear]) -> dict[str, tuple[str, int]]:
    """As in `DenseStream`: parts that give the very tensor which a layer gave, and nothing else."""
    ends: dict[str, tuple[str, int]] = {}
    for part in seen.outputs.keys() - linears.keys():
        given = seen.outputs[part]
        first, *others = given if isinstance(given, tuple) else (given,)
        layer = next((path for path in linears if seen.outputs.get(path) is first), None)
        if layer is not None and all(other is None for other in others):
            ends[part] = layer, len(given) if isinstance(given, tuple) else 0
    return ends


def _through(layer: nn.Linear, inputs: Tensor, compute: Compute) -> Tensor:
    with compute.context():
        output: Tensor = layer(inputs.to(compute.device))
    return output.to(inputs.device)


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
    """The residual stream just before ``writer`` adds to it, shaped like the batch; added up in the block's order."""
    earlier: list[Tensor] = [seen.outputs[path] for path in writers[: writers.index(writer)]]
    return sum((output.view_as(batch).to(batch.dtype) for output in earlier), batch)


def _residual_after(writer: str, writers: list[str], seen: _Seen, batch: Tensor) -> Tensor:
    """The residual stream just after ``writer`` added to it."""
    output: Tensor = seen.outputs[writer]
    return _residual_before(writer, writers, seen, batch) + output.view_as(batch)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
